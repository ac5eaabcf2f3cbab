"""Checks before a job whether it can start on the nodes of a hosts file: `scalekd doctor --hostfile launch/hosts`.

`agent` runs on each node, `remote` is the connection to it, `examine` asks all nodes at once, `checks` turns their answers into
problems, and `report` prints them. As the rest of `cluster`, it may import only `errors`, `files`, `rng` and `kernels`.
"""
