"""GitHub's own OpenAPI description: what the stand-in answers, and what it is asked, is held against it.

As a program, it reduces the description to the operations that are spoken of here.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

OPERATIONS = {
    "/repos/{owner}/{repo}": ("get",),
    "/repos/{owner}/{repo}/commits/{ref}": ("get",),
    "/repos/{owner}/{repo}/contents/{path}": ("get", "put"),
    "/repos/{owner}/{repo}/git/trees/{tree_sha}": ("get",),
}


def reduced(description: dict[str, Any]) -> dict[str, Any]:
    """The operations, and all that they refer to."""
    paths = {
        path: {method: description["paths"][path][method] for method in methods}
        for path, methods in OPERATIONS.items()
    }
    kept: dict[str, Any] = {"openapi": description["openapi"], "paths": paths, "components": {}}
    waiting = [*_references(paths), "#/components/schemas/basic-error"]
    seen: set[str] = set()
    while waiting:
        reference = waiting.pop()
        if reference in seen:
            continue
        seen.add(reference)
        _, _, kind, name = reference.split("/")
        found = description["components"][kind][name]
        kept["components"].setdefault(kind, {})[name] = found
        waiting += _references(found)
    return kept


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in _references(item)]
    if isinstance(value, list):
        return [found for item in value for found in _references(item)]
    return []


class Description:
    """The reduced description, and what is not as it says."""

    def __init__(self, file: Path) -> None:
        self._whole = json.loads(file.read_text())

    def example(self, path: str, method: str, status: str) -> Any:
        """The example of a response."""
        media = self.at(self._whole["paths"][path][method]["responses"][status])["content"]
        examples = media["application/json"]["examples"]
        return self.at(next(iter(examples.values())))["value"]

    def at(self, value: dict[str, Any]) -> dict[str, Any]:
        """What a value is, or refers to."""
        if "$ref" not in value:
            return value
        found = self._whole
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return found

    def problems(
        self, method: str, path: str, query: dict[str, str], body: Any, status: int, media: str, answer: Any
    ) -> list[str]:
        """How an exchange departs from the description."""
        found = [template for template in OPERATIONS if re.fullmatch(_pattern(template), path)]
        if not found or method.lower() not in OPERATIONS[found[-1]]:
            return [f"{method} {path} is not described"]
        operation = self._whole["paths"][found[-1]][method.lower()]
        problems = []
        known = [self.at(item) for item in operation["parameters"]]
        for name in query:
            if name not in [item["name"] for item in known if item["in"] == "query"]:
                problems.append(f"{method} {path}: no parameter {name}")
        if body is not None:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            problems += self._invalid(f"{method} {path}: request", schema, body)
        described = operation["responses"].get(str(status))
        if described is None and status not in (401, 403, 429):
            return [*problems, f"{method} {path}: {status} is not described"]
        if described is None:
            schema = {"$ref": "#/components/schemas/basic-error"}
        else:
            content = self.at(described).get("content", {})
            if media not in content:
                return problems
            schema = content[media]["schema"]
        return problems + self._invalid(f"{method} {path}: response {status}", schema, answer)

    def _invalid(self, what: str, schema: dict[str, Any], value: Any) -> list[str]:
        errors = self._validator(json.dumps(schema)).iter_errors(value)
        # the description has alternatives that do not exclude each other, where it says that they do
        wrong = [error for error in errors if "is valid under each of" not in error.message]
        return [f"{what}: {error.json_path}: {error.message[:300]}" for error in wrong]

    @cache  # noqa: B019 - one description per test session
    def _validator(self, schema: str) -> Any:
        from openapi_schema_validator import OAS30ReadValidator

        # the schema, with what its references lead to beside it
        return OAS30ReadValidator({**json.loads(schema), "components": self._whole["components"]})


def _pattern(template: str) -> str:
    return re.sub(r"\\\{path\\\}", ".+", re.sub(r"\\\{(?!path)\w+\\\}", "[^/]+", re.escape(template)))


if __name__ == "__main__":
    source, target = sys.argv[1:]
    Path(target).write_text(json.dumps(reduced(json.loads(Path(source).read_text()))))
