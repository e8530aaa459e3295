"""Features as bytes and through rings: back within the rounding, damage found and named, nothing that waits."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.label_nodes import label_node
from tests.worlds import GQA
from titan.distill.features.codec import (
    HEADER_BYTES,
    FeatureLabels,
    WireType,
    bytes_per_token,
    decode_step,
    encode_features,
    join,
    rows,
    step_bytes,
)
from titan.distill.features.stream import FeatureClient, FeatureReader, FeatureWriter
from titan.errors import LabelError
from titan.model.capture import Features

LENGTH = 5


def labels(first: int, samples: int, step: int = 7, largest: float = 3.0) -> FeatureLabels:
    generator = torch.Generator().manual_seed(100 * step + first)

    def draw(*shape: int) -> torch.Tensor:
        return largest * (2 * torch.rand(samples, LENGTH, *shape, generator=generator) - 1)

    tensors: Features = {"query": draw(4, 16), "key": draw(2, 16), "value": draw(2, 16), "hidden": draw(64)}
    return FeatureLabels(step, 3, first, np.arange(first, first + samples) + 2**40, tensors)


@pytest.mark.parametrize(("wire", "bits"), [("bf16", 8), ("fp16", 11)])
def test_features_come_back_within_half_a_unit_in_the_last_place(wire: WireType, bits: int) -> None:
    sent = [labels(0, 3), labels(8, 1)]
    back = decode_step(b"".join(encode_features(block, wire) for block in sent))
    assert len(back) == 2
    for block, other in zip(sent, back, strict=True):
        assert (other.step, other.layer, other.first_sample) == (block.step, block.layer, block.first_sample)
        assert other.sample_ids_B.tolist() == block.sample_ids_B.tolist()
        assert list(other.tensors) == list(block.tensors)
        for name, tensor in block.tensors.items():
            error = (other.tensors[name].double() - tensor.double()).abs()
            assert (error <= tensor.double().abs() * 2.0**-bits + 1e-7).all() and error.any()


def test_a_step_has_the_bytes_that_are_told_beforehand() -> None:
    names = ("query", "key", "value", "hidden")
    assert bytes_per_token(GQA, names) == 2 * (64 + 32 + 32 + 64)
    assert bytes_per_token(GQA, ("query", "key")) == 2 * (64 + 32)
    data = b"".join(encode_features(block, "bf16") for block in (labels(0, 3), labels(3, 2)))
    assert len(data) == step_bytes(2, 5, LENGTH, bytes_per_token(GQA, names))


def test_any_flipped_bit_and_any_cut_is_found() -> None:
    data = encode_features(labels(4, 2), "bf16")
    for place in [*range(0, HEADER_BYTES), *range(HEADER_BYTES, len(data), 37), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(LabelError, match=r"damaged header|features of step 7, samples from 4, are damaged"):
            decode_step(bytes(damaged))
    for length in (1, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
        with pytest.raises(LabelError, match="damaged"):
            decode_step(data[:length])


def test_a_block_of_a_newer_titan_is_refused_and_says_so() -> None:
    data = bytearray(encode_features(labels(0, 1), "bf16"))
    struct.pack_into("<H", data, 4, 2)
    data[HEADER_BYTES - 4 : HEADER_BYTES] = zlib.crc32(data[: HEADER_BYTES - 4]).to_bytes(4, "little")
    with pytest.raises(LabelError, match="format version 2, this titan reads up to 1; update titan"):
        decode_step(bytes(data))


def test_what_fp16_cannot_hold_is_refused() -> None:
    with pytest.raises(LabelError, match=r"query of layer 3 has values up to .*, fp16 ends at 65504; send .* as bf16"):
        encode_features(labels(0, 2, largest=1e6), "fp16")
    encode_features(labels(0, 2, largest=1e6), "bf16")


def test_blocks_of_a_step_join_only_if_every_sample_is_there() -> None:
    blocks = {first: labels(first, 2) for first in (0, 2, 4)}
    joined = join([blocks[4], blocks[0], blocks[2], blocks[0]], 6)
    assert joined is not None and joined.sample_ids_B.tolist() == [2**40 + i for i in range(6)]
    for name, tensor in joined.tensors.items():
        for first, block in blocks.items():
            assert torch.equal(tensor[first : first + 2], block.tensors[name])
    query = rows(joined, 1, 5, torch.device("cpu"))["query"]
    assert query.shape == (LENGTH, 4, 4, 16) and torch.equal(query[3, 1], joined.tensors["query"][2, 3])
    assert join([blocks[0], blocks[4]], 6) is None and join([blocks[2], blocks[4]], 4) is None
    assert join([blocks[0], blocks[2]], 6) is None and join([], 0) is None
    other = FeatureLabels(7, 2, 2, blocks[2].sample_ids_B, blocks[2].tensors)
    assert join([blocks[0], other], 4) is None, "of another layer"


def test_students_read_what_replicas_wrote_until_it_is_overwritten(tmp_path: Path) -> None:
    """Two replicas with two micro-batches a step, three slots; beside a dictionary of the newest steps."""
    size = step_bytes(2, 4, LENGTH, bytes_per_token(GQA, ("query", "key", "value", "hidden")))
    reader = FeatureReader(tmp_path)
    assert reader.read(1, 8) is None, "nobody has written anything"
    writers = [FeatureWriter(tmp_path, part, 2, slots=3, slot_bytes=size, wire="bf16") for part in range(2)]
    for step in range(1, 6):
        for part, writer in enumerate(writers):
            if part == 1:
                assert reader.read(step, 8) is None, "one replica alone is not the step"
            assert writer.write(step, [labels(2 * part, 2, step), labels(4 + 2 * part, 2, step)]) == size
        for asked in range(1, 7):
            found = reader.read(asked, 8)
            assert (found is not None) == (step - 3 < asked <= step)
            if found is not None:
                want = torch.cat([labels(first, 2, asked).tensors["value"] for first in (0, 2, 4, 6)])
                assert torch.equal(found.tensors["value"], want.bfloat16())
    reader.close()


def test_a_reader_follows_a_teacher_that_begins_anew_with_fewer_replicas(tmp_path: Path) -> None:
    def write(parts: int, step: int) -> None:
        samples = 4 // parts
        for part in range(parts):
            size = step_bytes(1, samples, LENGTH, 384)
            writer = FeatureWriter(tmp_path, part, parts, 2, size, "bf16")
            writer.write(step, [labels(part * samples, samples, step)])
            writer.close()

    reader = FeatureReader(tmp_path)
    write(2, 1)
    assert reader.read(1, 4) is not None
    write(1, 2)
    found = reader.read(2, 4)
    assert found is not None and found.step == 2 and len(reader.rings) == 1
    assert reader.read(1, 4) is None
    reader.close()


def test_a_student_of_a_label_service_gets_what_one_on_the_teachers_node_gets(tmp_path: Path) -> None:
    """From however many replicas the teacher has by now; what is gone, in whole or in part, is gone for both."""
    with label_node(tmp_path) as node:
        folder = node.labels / "teacher"
        node.serve()
        client, local = FeatureClient(node.reader()), FeatureReader(folder)
        assert client.read(1, 4) is None, "nobody has begun to send"
        for step, parts in enumerate((2, 4, 1), start=1):
            for part in range(parts):
                share = 4 // parts
                size = step_bytes(1, share, LENGTH, 384)
                FeatureWriter(folder, part, parts, 2, size, "bf16").write(step, [labels(part * share, share, step)])
            for asked in (step, step - 1, step + 1):
                got, want = client.read(asked, 4), local.read(asked, 4)
                assert (got is None) == (want is None) == (asked != step)
                if got is not None and want is not None:
                    assert got.sample_ids_B.tolist() == want.sample_ids_B.tolist()
                    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in want.tensors.items())
        FeatureWriter(folder, 1, 2, 2, size, "bf16").close()
        FeatureWriter(folder, 0, 2, 2, size, "bf16").write(4, [labels(0, 2, 4)])
        assert client.read(4, 4) is None, "a replica's part is missing"
