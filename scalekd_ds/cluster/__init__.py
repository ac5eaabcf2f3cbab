"""What a job on several machines needs: hosts files, exported variables, a heartbeat between ranks, and the doctor.

It may import `errors`, `files`, `rng` and `kernels`, and knows nothing of models or of a run's configuration.
"""
