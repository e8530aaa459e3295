"""Every codec by its name, and the number that a block's header knows it by.

    sampled  the likeliest entries, and draws from what is behind them    unbiased, the noise vanishes as students learn
    top_k    the likeliest entries, the rest as one bucket                biased
    random   ids drawn from the whole distribution, with their shares     unbiased, noisy (RS-KD, arXiv 2503.16870)
    full     log-probabilities of the whole vocabulary                    exact, 2 V bytes a token
    hidden   the teacher's last hidden states, and its output weight      exact up to bfloat16, 2 D bytes a token

Shape letters as in titan.distill.codec.raw; U distinct ids of all tokens in a row.
"""

import numpy as np

from titan.distill.codec.bits import BitReader, BitWriter, width_of
from titan.distill.codec.context import Context, read_entropy, write_entropy
from titan.distill.codec.raw import CodecName, RawLabels
from titan.distill.codec.sampled import decode_sampled, encode_sampled
from titan.errors import LabelError

CODEC_IDS: dict[CodecName, int] = {"top_k": 1, "sampled": 2, "random": 3, "full": 4, "hidden": 5}
STEPS_PER_NAT = 2048
"""Of `full`: a log-probability is at most 2^-12 nats off; 32 nats are the floor."""


def encode_labels(raw: RawLabels, context: Context, budget_bytes: float | None, writer: BitWriter) -> None:
    """Write the labels by their codec. The budget is for `sampled` and `top_k`."""
    match raw.codec:
        case "sampled" | "top_k":
            encode_sampled(raw, context, budget_bytes, writer)
        case "random":
            _encode_random(raw, context, writer)
        case "full":
            assert raw.dense_BSV is not None
            codes = np.clip(np.rint(raw.dense_BSV * np.float32(-STEPS_PER_NAT)), 0, 0xFFFF)
            writer.add_array(codes, "<u2")
        case "hidden":
            assert raw.hidden_BSD is not None
            writer.add_array(np.array([raw.weight_version]), "<u8")
            writer.add_array(to_bfloat16(raw.hidden_BSD), "<u2")
            if raw.output_weight_VD is not None:
                writer.add_array(to_bfloat16(raw.output_weight_VD), "<u2")


def decode_labels(codec: CodecName, context: Context, has_weight: bool, reader: BitReader) -> RawLabels:
    """Inverse of `encode_labels`, up to each codec's rounding."""
    shape = (len(context.sample_ids_B), context.length)
    match codec:
        case "sampled" | "top_k":
            return decode_sampled(codec, context, reader)
        case "random":
            return _decode_random(context, reader)
        case "full":
            codes = reader.take_array((*shape, context.vocab_size), "<u2")
            return RawLabels("full", context.temperature, dense_BSV=codes.astype(np.float32) / -STEPS_PER_NAT)
        case "hidden":
            version = int(reader.take_array((1,), "<u8")[0])
            hidden_BSD = from_bfloat16(reader.take_array((*shape, context.candidates), "<u2"))
            weight_VD = None
            if has_weight:
                weight_VD = from_bfloat16(reader.take_array((context.vocab_size, context.candidates), "<u2"))
            return RawLabels(
                "hidden", context.temperature, hidden_BSD=hidden_BSD, output_weight_VD=weight_VD, weight_version=version
            )


def codec_of(number: int) -> CodecName:
    """The codec's name. Raises LabelError for a number that this version does not know."""
    for name, known in CODEC_IDS.items():
        if known == number:
            return name
    raise LabelError(f"a label block has codec {number}, this titan reads {sorted(CODEC_IDS.values())}; update titan")


def _encode_random(raw: RawLabels, context: Context, writer: BitWriter) -> None:
    """Distinct ids in rising order, and how often each was drawn; every token has the same number of draws."""
    assert raw.draw_ids_BSM is not None
    ids_BSM = np.sort(raw.draw_ids_BSM, axis=-1)
    starts_BSM = np.ones(ids_BSM.shape, bool)
    starts_BSM[..., 1:] = ids_BSM[..., 1:] != ids_BSM[..., :-1]
    distinct_BS = np.count_nonzero(starts_BSM, axis=-1)
    places_U = np.flatnonzero(starts_BSM)
    counts_U = np.diff(places_U, append=ids_BSM.size)
    writer.add(distinct_BS - 1, width_of(context.draws))
    writer.add(ids_BSM[starts_BSM], context.id_bits)
    writer.add(counts_U - 1, width_of(context.draws))
    write_entropy(raw, context, writer)


def _decode_random(context: Context, reader: BitReader) -> RawLabels:
    """Entries whose shares of the draws are their probabilities; -inf where a token has fewer distinct ids."""
    shape = (len(context.sample_ids_B), context.length)
    count_bits = width_of(context.draws)
    distinct_BS = reader.take(shape[0] * shape[1], count_bits).astype(np.int64).reshape(shape) + 1
    total = int(distinct_BS.sum())
    mask_BSK = np.arange(int(distinct_BS.max(initial=0))) < distinct_BS[..., None]
    ids_BSK, counts_BSK = np.zeros(mask_BSK.shape, np.int32), np.zeros(mask_BSK.shape, np.float32)
    ids_BSK[mask_BSK] = reader.take(total, context.id_bits)
    counts_BSK[mask_BSK] = reader.take(total, count_bits) + 1
    with np.errstate(divide="ignore"):
        log_share_BSK = np.log(counts_BSK / np.float32(context.draws))
    entropy_BS = read_entropy(context, reader)
    return RawLabels("random", context.temperature, ids_BSK, log_share_BSK, entropy_BS=entropy_BS)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """uint16 bits of the nearest bfloat16, to even where two are near. At most 2^-8 of the value is lost."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
