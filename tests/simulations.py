"""Small simulations for tests."""

from typing import Any

from titan.config.simulation import SimulationConfig, check_simulation


def settings(**changes: Any) -> dict[str, Any]:
    """A small fleet; its step takes 10 s."""
    return {
        "name": "test",
        "days": 2.0,
        "fleet": [{"kind": "H100", "nodes": 4}],
        "step": {"seconds": 10.0},
        "checkpoint": {"every_steps": 6, "stall_s": 4.0},
    } | changes


def config_of(**changes: Any) -> SimulationConfig:
    return check_simulation(settings(**changes))


PIPELINE = {
    "schedule": "1f1b",
    "micro_batches": 8,
    "positions": [
        {"kind": "H100", "devices": 8, "count": 4, "forward_s": 1.0, "backward_s": 2.0, "tail_s": 0.5},
    ],
}
