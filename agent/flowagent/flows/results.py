"""Results: where the values that tasks and flows return are kept, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from string import Formatter
from typing import Any, ClassVar

from flowagent.flows.declarations import Declaration, absolute, aws_options, refuse, text, upload_options_of
from flowagent.flows.errors import FlowError


class Serializer:
    """Turns values into bytes and back."""

    name: ClassVar[str]

    def dumps(self, value: Any) -> bytes:
        raise NotImplementedError

    def loads(self, data: bytes) -> Any:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PickleSerializer(Serializer):
    """Any Python value, by cloudpickle, or by the standard pickle where cloudpickle is not installed."""

    name = "cloudpickle"

    def dumps(self, value: Any) -> bytes:
        try:
            import cloudpickle
        except ImportError:
            import pickle

            return pickle.dumps(value, protocol=4)
        data: bytes = cloudpickle.dumps(value, protocol=4)
        return data

    def loads(self, data: bytes) -> Any:
        import pickle

        return pickle.loads(data)  # noqa: S301  # whoever reads a result trusts the flow that wrote it


class JSONSerializer(Serializer):
    """JSON values; readable by everything."""

    name = "json"

    def dumps(self, value: Any) -> bytes:
        import json

        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()

    def loads(self, data: bytes) -> Any:
        import json

        return json.loads(data)


class PandasSerializer(Serializer):
    """A DataFrame as Parquet; needs pandas, with pyarrow or fastparquet, where the flow runs."""

    name = "parquet"

    def __init__(self, file_type: str = "parquet") -> None:
        if file_type != "parquet":
            raise FlowError(f"PandasSerializer writes parquet, and no {file_type!r}; leave file_type out")

    def dumps(self, value: Any) -> bytes:
        pandas = _pandas()
        if not isinstance(value, pandas.DataFrame):
            raise FlowError(
                f"PandasSerializer keeps a DataFrame, and no {type(value).__name__}; "
                "return one, or give that task another result"
            )
        data: bytes = value.to_parquet()
        return data

    def loads(self, data: bytes) -> Any:
        import io

        return _pandas().read_parquet(io.BytesIO(data))


def _pandas() -> Any:
    from importlib import import_module

    try:
        return import_module("pandas")
    except ImportError:
        raise FlowError(
            "PandasSerializer needs pandas in this interpreter: pip install pandas pyarrow"
        ) from None


_SERIALIZERS: dict[str, type[Serializer]] = {
    kind.name: kind for kind in (PickleSerializer, JSONSerializer, PandasSerializer)
}


def serializer_named(name: str) -> Serializer:
    """The serializer of a declaration. :raises FlowError: there is none of that name."""
    if name not in _SERIALIZERS:
        raise FlowError(f"unknown serializer {name!r} (known: {', '.join(sorted(_SERIALIZERS))})")
    return _SERIALIZERS[name]()


LOCATION_NAMES = (
    "flow_name",
    "task_name",
    "task_slug",
    "run_id",
    "attempt",
    "map_index",
    "date",
    "today",
    "yesterday",
    "tomorrow",
    "parameters",
)
"""What a location template may refer to; ``parameters`` as ``{parameters[name]}``."""


class Result(Declaration):
    """Base of all result declarations. ``storage`` is the type of the backend that reads and writes them.

    ``location`` is a template of the key, such as ``"{flow_name}/{task_slug}-{today}.pkl"``; without one,
    each result gets a key of its own.
    """

    family: ClassVar[str] = "result"
    common: ClassVar[tuple[str, ...]] = ("storage", "location", "serializer")
    storage: ClassVar[str]

    def __init__(
        self,
        location: str | None = None,
        serializer: Serializer | str | None = None,
        storage: str | None = None,
        **unknown: Any,
    ) -> None:
        refuse(
            self.type,
            unknown,
            {
                "validate_dir": "leave it out: the directory is made when a result is written",
                "connection_string": "the agent writes results: put it into the agent's environment as "
                "AZURE_STORAGE_CONNECTION_STRING, or into the secret that connection_string_secret names",
            },
        )
        if storage not in (None, self.storage):
            raise FlowError(f"{self.type} is kept by storage {self.storage!r}, not {storage!r}")
        self.location = text(location, f"{self.type}: location")
        chosen = serializer_named(serializer) if isinstance(serializer, str) else serializer
        if chosen is not None and not isinstance(chosen, Serializer):
            raise FlowError(
                f"{self.type}: serializer is PickleSerializer(), JSONSerializer() or PandasSerializer(); "
                f"got {chosen!r}"
            )
        self.serializer = (chosen or PickleSerializer()).name
        if self.location is not None:
            _check_location(self.location)


class LocalResult(Result):
    """Files under ``dir``, by default ``$FLOWAGENT_HOME/results`` of the agent."""

    fields: ClassVar[tuple[str, ...]] = ("dir",)
    storage = "Local"

    def __init__(self, dir: str | os.PathLike[str] | None = None, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.dir = absolute(dir, "LocalResult: dir")


class S3Result(Result):
    """Objects in a bucket of S3; options as for the storage :class:`~flowagent.storage.S3`."""

    fields: ClassVar[tuple[str, ...]] = ("bucket", "client_options", "upload_options")
    storage = "S3"

    def __init__(
        self,
        bucket: str,
        client_options: Mapping[str, Any] | None = None,
        upload_options: Mapping[str, Any] | None = None,
        *,
        boto3_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.bucket = _named(bucket, "S3Result: bucket")
        self.client_options = aws_options(client_options or boto3_kwargs, "S3Result: client_options")
        self.upload_options = upload_options_of(upload_options, "S3Result: upload_options")


class GCSResult(Result):
    """Objects in a bucket of Google Cloud Storage."""

    fields: ClassVar[tuple[str, ...]] = ("bucket", "project")
    storage = "GCS"

    def __init__(self, bucket: str, project: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.bucket = _named(bucket, "GCSResult: bucket")
        self.project = text(project, "GCSResult: project")


class AzureResult(Result):
    """Blobs in a container of Azure; the agent finds its connection string as for the storage
    :class:`~flowagent.storage.Azure`."""

    fields: ClassVar[tuple[str, ...]] = ("container", "connection_string_secret")
    storage = "Azure"

    def __init__(self, container: str, connection_string_secret: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.container = _named(container, "AzureResult: container")
        self.connection_string_secret = text(
            connection_string_secret, "AzureResult: connection_string_secret"
        )


def _named(value: str, what: str) -> str:
    checked = text(value, what)
    if checked is None or "://" in checked:
        raise FlowError(f"{what} takes its bare name; got {value!r}")
    return checked


def result_from_json(data: Mapping[str, Any] | None) -> Result | None:
    """The declaration of a JSON form; None for None. :raises FlowError: unknown type or field."""
    if data is None:
        return None
    result: Result = Result.from_json(data)
    return result


class _AnyParameter(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return "x"

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def _check_location(template: str) -> None:
    """Format a template with sample values. :raises FlowError: it cannot be, or leaves its place."""
    from datetime import datetime, timezone

    sample: dict[str, Any] = {**dict.fromkeys(LOCATION_NAMES, "x"), "parameters": _AnyParameter()}
    sample.update(date=datetime.now(timezone.utc), attempt=1, map_index=0)
    _format(template, sample)


def format_location(declaration: Result | Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
    """The key that a declaration's location template gives; None: it has no template.

    ``values`` are those of :data:`LOCATION_NAMES`. :raises FlowError: a value is missing, or the key would be
    absolute or contain ``..``."""
    template = declaration.location if isinstance(declaration, Result) else declaration.get("location")
    return None if template is None else _format(template, values)


def _format(template: str, values: Mapping[str, Any]) -> str:
    what = f"result location {template!r}"
    try:
        for _, field, spec, _ in Formatter().parse(template):
            if field is None:
                continue
            name, index, rest = field.partition("[")
            if (
                name not in LOCATION_NAMES
                or (index and rest.find("]") != len(rest) - 1)
                or "{" in (spec or "")
            ):
                raise FlowError(f"{what}: no value {field!r}; there are {', '.join(LOCATION_NAMES)}")
        key = template.format_map(values)
    except (KeyError, IndexError) as error:
        raise FlowError(f"{what}: there is no value {error.args[0]!r} for it") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise FlowError(f"{what} cannot be formatted: {error}") from None
    if key.startswith("/") or key.endswith("/") or "\0" in key or {"", ".", ".."} & set(key.split("/")):
        raise FlowError(f"{what}: gives the key {key!r}; it must name a file below the result's directory")
    return key


def __getattr__(name: str) -> Any:
    if name in ("ConstantResult", "PrefectResult", "SecretResult"):
        # not AttributeError: ``from flowagent.results import ...`` would replace its message by its own
        raise ImportError(f"flowagent.results has no {name}; there are {', '.join(sorted(Result.types))}")
    if name.endswith("Serializer"):
        known = ", ".join(sorted(kind.__name__ for kind in _SERIALIZERS.values()))
        raise ImportError(f"flowagent.results has no {name}; there are {known}")
    raise AttributeError(f"module 'flowagent.results' has no attribute {name!r}")
