"""All that touches DeepSpeed itself: processes, the engine, its JSON, and where ZeRO keeps parameters.

This package may use the method (`distiller`, `teacher` and the like), `models`, `data`, `config` and the layers below
them.
"""
