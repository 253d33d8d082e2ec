"""Operations on flows and their versions."""

from __future__ import annotations

from collections.abc import Iterable

from flowagent.errors import NotFoundError
from flowagent.models import FlowSpec, FlowVersion, Registration
from flowagent.store import rows
from flowagent.store.database import Transaction


def register(tx: Transaction, spec: FlowSpec, content_hash: str) -> Registration:
    flow_id = _flow_id(tx, spec.name)
    known = _versions(tx, "f.id = :flow_id AND v.id = f.current_version_id", flow_id=flow_id)
    previous = known[0] if known else None
    if previous is not None and previous.content_hash == content_hash:
        return Registration(previous, previous, created=False)
    created = not _versions(
        tx, "f.id = :flow_id AND v.content_hash = :hash", flow_id=flow_id, hash=content_hash
    )
    if created:
        tx.execute(
            "INSERT INTO flow_version (flow_id, number, content_hash, created, spec) "
            "SELECT :flow_id, COALESCE(MAX(number), 0) + 1, :hash, :now, :spec "
            "FROM flow_version WHERE flow_id = :flow_id",
            {"flow_id": flow_id, "hash": content_hash, "spec": rows.to_json(spec.to_json())},
        )
    tx.execute(
        "UPDATE flow SET current_version_id = (SELECT v.id FROM flow_version v "
        "WHERE v.flow_id = flow.id AND v.content_hash = :hash) WHERE id = :flow_id",
        {"flow_id": flow_id, "hash": content_hash},
    )
    return Registration(
        _versions(tx, "f.id = :flow_id AND v.content_hash = :hash", flow_id=flow_id, hash=content_hash)[0],
        previous,
        created,
    )


def _flow_id(tx: Transaction, name: str) -> int:
    """The id of a flow, which is inserted if it is new; others that register it wait for us."""
    select = f"SELECT id FROM flow WHERE name = :name{tx.dialect.locked}"  # noqa: S608
    found = tx.execute(select, {"name": name})
    if not found:
        tx.execute(
            "INSERT INTO flow (name, created) VALUES (:name, :now) ON CONFLICT DO NOTHING", {"name": name}
        )
        found = tx.execute(select, {"name": name})
    return int(found[0][0])


def flows(tx: Transaction) -> list[FlowVersion]:
    return _versions(tx, "v.id = f.current_version_id ORDER BY f.name")


def flow(tx: Transaction, name: str) -> FlowVersion:
    found = _versions(tx, "f.name = :name AND v.id = f.current_version_id", name=name)
    if not found:
        raise _no_flow(tx, name)
    return found[0]


def versions(tx: Transaction, name: str) -> list[FlowVersion]:
    found = _versions(tx, "f.name = :name ORDER BY v.number DESC", name=name)
    if not found:
        raise _no_flow(tx, name)
    return found


def version(tx: Transaction, version_id: int) -> FlowVersion:
    found = _versions(tx, "v.id = :version_id", version_id=version_id)
    if not found:
        raise NotFoundError(f"no flow version has the id {version_id}; see `flowagent flows`")
    return found[0]


def specs(tx: Transaction, version_ids: Iterable[int]) -> dict[int, FlowSpec]:
    """The specs of versions, by id."""
    found = tx.execute(
        f"SELECT id, spec FROM flow_version "  # noqa: S608
        f"WHERE id IN (SELECT CAST(value AS INTEGER) FROM {tx.dialect.each})",
        {"items": rows.to_json(list(version_ids))},
    )
    return {id: rows.flow_spec(spec) for id, spec in found}


def _versions(tx: Transaction, condition: str, **values: object) -> list[FlowVersion]:
    return [rows.flow_version(row) for row in tx.execute(f"{rows.VERSION} WHERE {condition}", values)]


def _no_flow(tx: Transaction, name: str) -> NotFoundError:
    from difflib import get_close_matches

    names = {str(known) for (known,) in tx.execute("SELECT name FROM flow")}
    folded = {known.casefold(): known for known in names}
    near = [folded[match] for match in get_close_matches(name.casefold(), folded)]
    advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `flowagent flows`"
    return NotFoundError(f"no flow is registered as {name!r}; {advice}")
