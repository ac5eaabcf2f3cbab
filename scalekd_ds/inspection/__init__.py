"""Draws a contact sheet of what trained models see in given images, for the verb `inspect`.

It may import `checkpoint` and `optim` and everything below them, but not `plan` or `evaluation` beside it.

`inspected_models` opens the models and `images` the images, `predictions` compares what the models predict,
`projector_attention` restores the projectors and computes their attention, `frequencies` and `pictures` make spectra and
pictures, `sheet` draws them, and `compose` calls all of these.
"""
