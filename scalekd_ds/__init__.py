"""scalekd_ds: distil huge vision transformers into models that ship (ScaleKD, NeurIPS 2024)."""

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.student import Student
from scalekd_ds.teacher import Teacher

__all__ = ["ScaleKD", "Student", "Teacher"]
__version__ = "0.1.0"
