"""Which device a process gets. Ascend's own software is played by a fake; what titan does around it is real."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from titan.cluster import session
from titan.config.settings import ClusterSettings
from titan.errors import PlatformError
from titan.platform import device


@pytest.fixture
def ascend(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[object]]:
    """A machine with two NPUs: modules with torch_npu's names that note how they are called."""
    calls: dict[str, list[object]] = {"set_device": [], "synchronize": [], "transfer": []}
    runtime = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_name=lambda index: f"Ascend910B-{index}",
        set_device=lambda which: calls["set_device"].append(which),
        synchronize=lambda which: calls["synchronize"].append(which),
    )
    monkeypatch.setattr(torch, "npu", runtime, raising=False)
    package = ModuleType("torch_npu")
    package.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    imported = device.importlib.import_module

    def import_module(name: str) -> object:
        if name == "torch_npu.contrib.transfer_to_npu":
            return calls["transfer"].append(name)
        return imported(name)

    monkeypatch.setattr(device.importlib, "import_module", import_module)
    monkeypatch.setattr(device.torch, "device", lambda kind, index=0: f"{kind}:{index}")  # torch knows no npu here
    return calls


def test_an_npu_is_taken_where_there_is_one_and_collectives_are_hccl(ascend: dict[str, list[object]]) -> None:
    for wanted in ("auto", "npu"):
        platform = device.select_platform(wanted)  # type: ignore[arg-type]
        assert (platform.kind, platform.name) == ("npu", "Ascend910B-0")
        assert platform.backend == "cpu:gloo,npu:hccl" and not platform.has_tags
    platform.synchronize()
    threads = torch.get_num_threads()
    device.prepare_process(platform, threads)
    assert ascend == {
        "synchronize": [platform.device],
        "set_device": [platform.device],
        "transfer": ["torch_npu.contrib.transfer_to_npu"],
    }
    assert device.select_platform("cpu").kind == "cpu", "cpu stays cpu"


def test_the_inventory_of_a_machine_with_npus_counts_them(
    ascend: dict[str, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_may_have_accelerator", lambda: True)
    (node,) = session.local_inventory(ClusterSettings()).nodes
    assert (node.device, node.slots) == ("npu", 2)
    with pytest.raises(PlatformError, match=r"cluster.device is 'cuda', but this machine has no such device"):
        session.local_inventory(ClusterSettings(device="cuda"))


@pytest.mark.parametrize(
    ("wanted", "why"), [("cuda", "torch sees no CUDA device"), ("npu", "no Ascend device, or no torch_npu")]
)
def test_a_device_that_is_not_there_is_an_error(wanted: str, why: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(PlatformError, match=f"cluster.device is {wanted!r}, but .*{why}.*set cluster.device to 'auto'"):
        device.select_platform(wanted)  # type: ignore[arg-type]


def test_without_accelerators_auto_is_the_cpu_with_gloo() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    platform = device.select_platform("auto")
    assert (platform.kind, platform.backend, platform.has_tags) == ("cpu", "gloo", True)


@pytest.mark.parametrize(
    ("resources", "wanted", "found"),
    [
        ({"CPU": 8, "GPU": 2}, "auto", ("cuda", 2)),
        ({"CPU": 8, "NPU": 4}, "auto", ("npu", 4)),
        ({"CPU": 8, "NPU": 4}, "cpu", ("cpu", 32)),
        ({"CPU": 8, "GPU": 1, "NPU": 4}, "npu", ("npu", 4)),
        ({"CPU": 8}, "auto", ("cpu", 32)),
        ({"CPU": 8}, "npu", None),
    ],
)
def test_what_ray_says_a_node_has(
    resources: dict[str, int], wanted: str, found: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"Alive": True, "NodeName": "a", "Resources": resources}
    monkeypatch.setattr(session.ray, "nodes", lambda: [node, {"Alive": False}])
    settings = ClusterSettings(device=wanted)  # type: ignore[arg-type]
    if found is None:
        with pytest.raises(PlatformError, match="no such device"):
            session.discover(settings)
        return
    (got,) = session.discover(settings).nodes
    assert (got.device, got.slots) == found
