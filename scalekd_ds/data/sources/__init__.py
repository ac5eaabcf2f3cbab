"""Which images there are, and how the bytes of one are read: folders, tables, tars, TFRecords, Hugging Face."""
