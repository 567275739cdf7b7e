"""Every record survives its file; a file that is none is refused."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import unvanish as uv
from unvanish.flow.files import SCHEMA


def records() -> dict[str, Any]:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(3, 4, bidirectional=True, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    with uv.watch(lstm) as flow:
        y, _ = lstm(x)
        y.sum().backward()
    return {
        "flow": uv.flow.Flow(flow.layers),
        "map": uv.flow.adjoint_map(lstm, x, sources=[1, 4], at="l0.reverse"),
        "terms": uv.flow.decompose(lstm, x, textbook=True, matrices=True),
        "sources": uv.flow.source_gradients(lstm, x, error=torch.ones_like(y)),
        "gates": uv.flow.gate_statistics(lstm, x),
        "lyapunov": uv.flow.lyapunov(lstm, x, n=3),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)))
    if isinstance(a, uv.flow.Record):
        return type(a) is type(b) and same(a.contents(), b.contents())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("name", list(records()))
def test_a_record_survives_its_file(name: str, tmp_path: Path) -> None:
    record = records()[name]
    record.save(tmp_path / "r.flow")
    loaded = uv.flow.load(tmp_path / "r.flow")
    assert same(loaded, record)
    assert repr(loaded) == repr(record)
    assert same(type(record).load(tmp_path / "r.flow"), record)
    other = uv.flow.GateStatistics if name != "gates" else uv.flow.AdjointMap
    with pytest.raises(ValueError, match=f"expected a {other.__name__}, found a {type(record).__name__}"):
        other.load(tmp_path / "r.flow")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_lacks_survive(value: float, tmp_path: Path) -> None:
    record = dataclasses.replace(records()["flow"]["l0"], residual=value)
    record.save(tmp_path / "r.flow")
    assert same(uv.flow.load(tmp_path / "r.flow").residual, value)


def test_data_frames_hold_the_same_numbers() -> None:
    found = records()
    frame = found["map"].to_dataframe()
    row = frame[(frame.source == 4) & (frame.t == 5) & (frame["sample"] == 1)].iloc[0]
    assert row.norm == float(found["map"].norms[1, 5, 1])
    assert set(frame.lag) == {0, 1, 2, 3, 4}
    terms = found["terms"].to_dataframe()
    shares = terms[terms.t < 5].groupby(["t", "sample"]).share.sum()
    assert shares.tolist() == pytest.approx([1.0] * 10)
    assert found["sources"].to_dataframe().source.tolist() == list(range(6))
    gates = found["gates"].to_dataframe()
    assert gates.mean_f.tolist() == found["gates"].mean[1].tolist()
    assert len(found["lyapunov"].to_dataframe()) == 6 * 3
    product = found["terms"].textbook
    rows = product.to_dataframe()
    assert rows.columns.tolist() == ["t", "sample", "apart", "log_exact", "log_textbook"]
    assert rows[rows["sample"] == 1].apart.tolist() == product.apart[:, 1].tolist()
    flow = found["flow"].to_dataframe()
    assert (
        flow[(flow.layer == "l0.reverse") & (flow["sample"] == 1)].dh.tolist()
        == found["flow"]["l0.reverse"].dh[:, 1].tolist()
    )


def test_what_a_record_says_of_itself_are_its_numbers() -> None:
    found = records()
    flow = found["flow"]["l0"]
    assert flow.dc is not None
    present = [flow.dc[t][flow.lengths > t].median() for t in range(6)]
    peak = max(map(float, present))
    at = present.index(peak)
    reach = next((lag for lag in range(at + 1) if present[at - lag] <= peak / 100), at + 1) - 1
    steps = f"reach {reach} of {at} step{'' if at == 1 else 's'}, " if at else "does not fade on its way; "
    assert f"‖∂E/∂c_t‖, median over samples: {steps}peak {peak:.2g} at t={at}" in repr(found["flow"])
    assert repr(found["map"]) == "AdjointMap of c at l0.reverse: 2 sources, 6 steps, 2 samples"
    assert f"median share {found['terms'].carry.share.nanmedian():.3f}" in repr(found["terms"])
    assert f"‖∂E_k/∂W‖ {found['sources'].norms.min():.2e}" in repr(found["sources"])
    assert f"f {float(found['gates'].mean[1].mean()):.3f}" in repr(found["gates"])
    assert f"{float(found['lyapunov'].exponents[0]):.3g}" in repr(found["lyapunov"])
    # Facts, never verdicts.
    assert not any(word in repr(r) for r in found.values() for word in ("vanish", "explod", "healthy", "dead"))


def write(path: Path, header: dict[str, str], **tensors: Tensor) -> None:
    save_file({"0": torch.zeros(2), **tensors}, path, header)


@pytest.mark.parametrize(
    "tree",
    [
        "null",
        "[]",
        "7",
        "{",
        '{"record": "Path", "fields": {}}',
        '{"record": "AdjointMap", "fields": {"nonsense": 1}}',
        '{"record": "AdjointMap", "fields": []}',
        '{"tensor": "9"}',
        '{"set": [1]}',
        '{"dict": {"a": {"tensor": "0"}}}',
        "[" * 100_000,
    ],
)
def test_a_wrong_tree_is_refused(tree: str, tmp_path: Path) -> None:
    write(tmp_path / "f", {"unvanish.flow": str(SCHEMA), "record": tree})
    with pytest.raises(ValueError, match="not a flow file written by unvanish"):
        uv.flow.load(tmp_path / "f")


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"expected a flow file, got a folder"):
        uv.flow.load(tmp_path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "f", {"unvanish.flow": "99", "record": "{}"})
    with pytest.raises(ValueError, match=f"expected a flow file of schema {SCHEMA}, found schema '99'"):
        uv.flow.load(tmp_path / "f")


@given(data=st.binary(max_size=200), cut=st.integers(0, 3000), at=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read(
    data: bytes, cut: int, at: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "f"
    records()["gates"].save(path)
    whole = bytearray(path.read_bytes())
    whole[at % len(whole)] = byte
    path.write_bytes(bytes(whole[: cut or None]) + data)
    with contextlib.suppress(ValueError):
        uv.flow.load(path)


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    gates = dataclasses.replace(records()["gates"], cell=object())
    with pytest.raises(TypeError, match="can't keep a object in a flow file"):
        gates.save(tmp_path / "f")
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
