"""What a ``.gguf`` file tells of lengths, types and offsets is checked before anything follows it."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType

from fuzzing.gguf_bytes import ARRAY, BOOL, STRING, Fact, Gguf
from lowbit.checkpoints.gguf_layout import check_layout, copy_keys
from lowbit.errors import LowbitError
from test_gguf_reader import write_gguf

F16, F32, Q8_0, MXFP4, I8 = 1, 0, 8, 39, 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")


def changed(source: Path, change: Callable[[Gguf], None]) -> Path:
    file = Gguf.read(source)
    change(file)
    path = source.parent / "changed.gguf"
    file.write(path)
    return path


def message(path: Path) -> str:
    began = time.monotonic()
    with pytest.raises(LowbitError) as caught:
        check_layout(path)
    assert time.monotonic() - began < 5
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400 + len(str(path))
    return str(caught.value)


def set_info(index: int, **fields: object) -> Callable[[Gguf], None]:
    def change(file: Gguf) -> None:
        file.infos[index] = replace(file.infos[index], **fields)

    return change


def put(key: str, fact: Fact) -> Callable[[Gguf], None]:
    return lambda file: file.put(key, fact)


def test_a_whole_file_passes(source: Path) -> None:
    check_layout(source)
    check_layout(changed(source, lambda file: None))


@pytest.mark.parametrize("alignment", [8, 64, 256])
def test_the_files_own_alignment_counts(
    source: Path, tmp_path: Path, alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors lie where the ``gguf`` package reads them."""
    values = [tensor.data.tobytes() for tensor in GGUFReader(source).tensors]
    file = Gguf.read(source)
    file.data = b""
    for index, value in enumerate(values):
        file.infos[index] = replace(file.infos[index], offset=len(file.data))
        file.data += value + bytes(-len(value) % alignment)
    file.put("general.alignment", Fact.of(alignment))
    monkeypatch.setattr("fuzzing.gguf_bytes.ALIGNMENT", alignment)
    file.write(tmp_path / "m.gguf")
    check_layout(tmp_path / "m.gguf")
    assert [tensor.data.tobytes() for tensor in GGUFReader(tmp_path / "m.gguf").tensors] == values


def test_keys_without_tensors(source: Path, tmp_path: Path) -> None:
    copy_keys(source, tmp_path / "keys.gguf")
    whole, keys = GGUFReader(source), GGUFReader(tmp_path / "keys.gguf")
    assert keys.tensors == []
    counts = {"GGUF.tensor_count"}
    assert whole.fields.keys() == keys.fields.keys() > counts
    for name in whole.fields.keys() - counts:
        assert whole.fields[name].contents() == keys.fields[name].contents()


@pytest.mark.parametrize("offset", [0, 1, 31, 20000, 2**40, 2**63, 2**64 - 32])
def test_tensors_lie_one_behind_the_other(source: Path, offset: int) -> None:
    """An overlap, a hole, no alignment, behind the end, and a sum that wraps around at 64 bits."""
    expected = Gguf.read(source).infos[3].offset
    assert f"lies at {offset} of the data, expected at {expected}" in message(
        changed(source, set_info(3, offset=offset))
    )


def test_the_order_of_the_list_is_that_of_the_data(source: Path) -> None:
    assert "expected at 0" in message(changed(source, lambda file: file.infos.reverse()))


@pytest.mark.parametrize("kind", [F32, Q8_0, MXFP4, I8])
def test_another_type_over_the_same_bytes_leaves_a_hole_or_overlaps(source: Path, kind: int) -> None:
    assert Gguf.read(source).infos[0].kind == F16
    assert "expected at" in message(changed(source, set_info(0, kind=kind)))


def test_a_smaller_type_of_the_last_tensor_leaves_bytes_behind_it(source: Path) -> None:
    assert "behind the last tensor" in message(changed(source, set_info(-1, kind=MXFP4)))


def test_a_larger_type_of_the_last_tensor_ends_behind_the_file(source: Path) -> None:
    assert "ends at byte" in message(changed(source, set_info(-1, kind=F32)))


def test_behind_the_last_tensor_are_zeros_at_most(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(source.read_bytes() + bytes(4096))
    check_layout(path)
    path.write_bytes(source.read_bytes() + bytes(4095) + b"x")
    assert "4096 bytes behind the last tensor belong to none" in message(path)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": 99}, "the type 99"),
        ({"dims": (128, 100), "kind": 42}, "expected at"),  # where a fork's type of that number is smaller
        ({"kind": 2**31}, "the type 2147483648"),
        ({"dims": (1, 1, 1, 1, 1)}, "5 dimensions"),
        ({"dims": (2**40,)}, "expected at|ends at"),
        ({"dims": (2**63, 2)}, "expected at|ends at"),
        ({"name": "output_norm.weight"}, "'output_norm.weight' is there twice"),
        ({"name": "a\nb" * 1000, "kind": 99}, r"'a\\nba\\nb.*\.\.\.'? has the type 99"),
    ],
)
def test_impossible_tensors(source: Path, fields: dict[str, object], told: str) -> None:
    assert re.search(told, message(changed(source, set_info(0, **fields))))


def test_rows_are_whole_blocks(source: Path) -> None:
    assert "no multiple of its type's 32" in message(changed(source, set_info(0, dims=(48, 100), kind=Q8_0)))


@pytest.mark.parametrize("count", [2**31, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("inner", [kind for kind in GGUFValueType if kind != GGUFValueType.ARRAY])
def test_lengths_of_arrays_end_inside_the_file(source: Path, inner: GGUFValueType, count: int) -> None:
    array = Fact(ARRAY, struct.pack("<IQ", inner, count))
    assert "'llama.block_count' at byte" in message(changed(source, put("llama.block_count", array)))


@pytest.mark.parametrize(
    ("fact", "told"),
    [
        (Fact(STRING, struct.pack("<Q", 2**63)), "takes 9223372036854775808 bytes"),
        (Fact(ARRAY, struct.pack("<IQ", STRING, 1) + struct.pack("<Q", 2**40)), "takes 1099511627776 bytes"),
        (Fact(ARRAY, struct.pack("<IQ", ARRAY, 2**20)), "array of arrays"),
        (Fact(ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000), "array of arrays"),
        (Fact(ARRAY, struct.pack("<IQ", 99, 3)), "unknown type 99"),
        (Fact(13, b"\0" * 4), "unknown type 13"),
        (Fact(STRING, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
    ],
)
def test_impossible_values(source: Path, fact: Fact, told: str) -> None:
    assert told in message(changed(source, put("general.name", fact)))


@pytest.mark.parametrize("fact", [Fact.of(n) for n in (0, 7, 48)] + [Fact.of("x"), Fact(BOOL, b"\1"), Fact.of([32])])
def test_an_alignment_is_a_power_of_two(source: Path, fact: Fact) -> None:
    assert "power of two" in message(changed(source, put("general.alignment", fact)))


def test_a_key_is_there_once(source: Path) -> None:
    found = message(changed(source, lambda file: file.facts.append(("llama.block_count", Fact.of(1)))))
    assert "'llama.block_count' is there twice" in found


@pytest.mark.parametrize("count", [2**20, 2**31, 2**62, 2**64 - 1])
def test_counts_fit_the_file(source: Path, count: int) -> None:
    assert f"tells {count} keys" in message(changed(source, lambda file: setattr(file, "fact_count", count)))
    assert f"tells {count} tensors" in message(changed(source, lambda file: setattr(file, "tensor_count", count)))


@pytest.mark.parametrize(
    ("version", "told"), [(0, "version 0"), (1, "version 1"), (4, "2 and 3"), (3 << 24, "byte order")]
)
def test_versions(source: Path, version: int, told: str) -> None:
    assert told in message(changed(source, lambda file: setattr(file, "version", version)))


def test_version_2_is_read(source: Path) -> None:
    check_layout(changed(source, lambda file: setattr(file, "version", 2)))


@pytest.mark.parametrize("size", [4, 5, 8, 23, 24, 40, 1000, 5000, -1, -33])
def test_cut_files(source: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(source.read_bytes()[:size])
    assert "not a complete GGUF file" in message(path)
