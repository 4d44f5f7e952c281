"""What a run still needs of the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowbit.errors import LowbitError
from lowbit.pipeline.disk_space import check_space
from lowbit.pipeline.end_to_end import STATE
from lowbit.runs.folder import FIRST, RUN
from lowbit.runs.latent_weights import latent_file
from runs import quantize_tiny
from tiny import save_tiny


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=count))


def test_what_a_run_keeps_aside_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tmp_path / FIRST
    first.mkdir(parents=True)
    for path in (tmp_path / "block-00000.safetensors", first / latent_file(0), tmp_path / RUN / STATE):
        path.write_bytes(b"0" * 1000)
    (tmp_path / "lowbit.json").write_bytes(b"0" * 1000)  # no weights, and in no estimate
    free(monkeypatch, 500)
    check_space(tmp_path, 3500)
    with pytest.raises(LowbitError, match=r"takes about 501 more bytes, .* has 500 free"):
        check_space(tmp_path, 3501)


def test_an_interrupted_tune_run_goes_on_where_the_disk_holds_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "m", "llama")
    needed: list[int] = []
    monkeypatch.setattr("lowbit.pipeline.quantize.check_space", lambda out, count: needed.append(count))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: [rtn, tune: {epochs: 1}]\n")

    def stop(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lowbit.pipeline.end_to_end.fit", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_tiny(tmp_path / "m", tmp_path / "run", "w4a16g16-sym", recipe=str(recipe))
    kept = sum(path.stat().st_size for path in (tmp_path / "run" / RUN).rglob("*.safetensors"))
    assert kept > 0
    monkeypatch.setattr("lowbit.pipeline.quantize.check_space", check_space)
    free(monkeypatch, needed[0] - kept)
    assert quantize_tiny(tmp_path / "m", tmp_path / "run", "w4a16g16-sym", recipe=str(recipe)).out.is_dir()
