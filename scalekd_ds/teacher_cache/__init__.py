"""A teacher's answers on disk: its target tokens and logits for numbered views of images, and its last stage's weights.

`scalekd cache` writes a cache (`scalekd_ds.caching`), and `--teacher_cache DIR` trains from one without the teacher's trunk.
"""
