"""DeepSpeed: processes, the one engine, its JSON, and where ZeRO keeps what."""
