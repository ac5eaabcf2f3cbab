"""Makes teacher caches: the job of `scalekd cache`, which runs the teacher and the loader alone, on all ranks."""
