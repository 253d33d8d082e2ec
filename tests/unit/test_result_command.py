"""What ``flowagent result`` loads, and what it refuses."""

from __future__ import annotations

import collections
import datetime
import decimal
import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from flowagent.cli.result import _chosen, _load
from flowagent.errors import NotFoundError, UsageError
from flowagent.models import TaskRun
from flowagent.results import JSONSerializer, PandasSerializer, PickleSerializer

PICKLED = {"serializer": PickleSerializer.name}
VALUES = [
    None,
    {"a": [1, 2.5, True, b"x", "ü"]},
    {1, 2},
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    decimal.Decimal("1.50"),
    uuid.UUID(int=1),
    Path("/a/b"),
    collections.OrderedDict(a=1),
    range(3),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_data_is_loaded(value: Any) -> None:
    assert _load(PICKLED, PickleSerializer().dumps(value), trust=False) == value


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def hostile(mark: Path) -> list[bytes]:
    return [
        pickle.dumps(Evil(mark)),
        f"cposix\nsystem\n(S'mkdir {mark}'\ntR.".encode(),
        f'cbuiltins\neval\n(S\'__import__("os").mkdir("{mark}")\'\ntR.'.encode(),
        f"cdatetime\nsys.modules.__class__\n(S'{mark}'\ntR.".encode(),
        pickle.dumps({"deep": [Evil(mark)]}, protocol=4),
        cloudpickle.dumps(lambda: os.mkdir(mark)),
        b"\x80\x04\x8c\x08datetime\x8c\x0bsys.modules\x93.",  # STACK_GLOBAL with a dotted name
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_pickle_that_does_something_is_refused(number: int, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    with pytest.raises(
        UsageError, match=r"the result holds .*; add --trust if you know who made it, or save"
    ):
        _load(PICKLED, hostile(mark)[number], trust=False)
    assert not mark.exists()


def test_trust_loads_it(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    _load(PICKLED, hostile(mark)[0], trust=True)
    assert mark.exists()


@pytest.mark.parametrize("data", [b"", b"junk", pickle.dumps([1])[:-1], b"\x80\x04\x8e" + b"\xff" * 8])
def test_what_is_no_pickle(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"the result cannot be loaded here: .*; save it with --output FILE"):
        _load(PICKLED, data, trust=False)


def test_other_serializers() -> None:
    import pandas

    assert _load({"serializer": "json"}, JSONSerializer().dumps({"a": 1}), trust=False) == {"a": 1}
    table = pandas.DataFrame({"a": [1, 2], "b": ["x", None]})
    again = _load({"serializer": "parquet"}, PandasSerializer().dumps(table), trust=False)
    pandas.testing.assert_frame_equal(again, table)
    with pytest.raises(Exception, match="PandasSerializer keeps a DataFrame, and no list; return one"):
        PandasSerializer().dumps([1])


def test_which_task_is_meant() -> None:
    class run:
        id = "r1"
        flow_name = "etl"

    kept = {"storage": "Local"}
    tasks = [
        TaskRun("r1", 1, "a", "completed", result=kept),
        TaskRun("r1", 1, "b", "completed", result={"none": True}),
    ]
    assert _chosen(run, tasks, None).task == "a"  # type: ignore[arg-type]
    assert _chosen(run, tasks, "b").task == "b"  # type: ignore[arg-type]
    tasks.append(TaskRun("r1", 1, "c", "completed", result=kept))
    with pytest.raises(NotFoundError, match="run r1 has results of several tasks, name one of them: a, c"):
        _chosen(run, tasks, None)  # type: ignore[arg-type]
    tasks.append(TaskRun("r1", 1, "", "completed", result=kept))
    assert _chosen(run, tasks, None).task == ""  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match="run r1 has no task 'x'; it has: a, b, c"):
        _chosen(run, tasks, "x")  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match="has kept no result; give its flow a result="):
        _chosen(run, [], None)  # type: ignore[arg-type]
