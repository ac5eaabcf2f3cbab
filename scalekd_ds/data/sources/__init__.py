"""Opens image data sets of every kind: folders, tables, tars, TFRecords, Hugging Face.

Each kind is indexed once and gives the encoded bytes of any image. This package may use `config`, `cluster` and the
layers below them.
"""
