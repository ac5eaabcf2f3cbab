"""What a run needs before it is started: memory by part, bytes on the wire, hours; from shapes alone."""

from scalekd_ds.plan.choose import Cluster, Plan, make_plan
from scalekd_ds.plan.communication import Collective, collectives
from scalekd_ds.plan.measure import Measured, measure
from scalekd_ds.plan.memory import Layout, memory_parts
from scalekd_ds.plan.throughput import Assumptions, step_time

__all__ = [
    "Assumptions",
    "Cluster",
    "Collective",
    "Layout",
    "Measured",
    "Plan",
    "collectives",
    "make_plan",
    "measure",
    "memory_parts",
    "step_time",
]
