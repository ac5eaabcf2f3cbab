"""What trained models see in given images, on one sheet: the `inspect` verb.

`subjects` opens the models, `pictured` the images, `answers` compares what they predict, `focus` finds where the projectors
look, and `sheet` draws it all.
"""
