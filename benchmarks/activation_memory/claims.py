"""From raw rows to one line an arm, and to what is claimed of them."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.activation_memory.arms import find_arms
from benchmarks.results import Claim, at_most

__all__ = ["claims_of", "summary"]


def summary(rows: list[dict[str, Any]], shape: str) -> dict[str, Any]:
    """One line an arm, against plain: least time over least time, median peak over median peak."""
    mine = [row for row in rows if row["shape"] == shape]
    kinds = {arm.name: arm for arm in find_arms(shape)}
    costs: dict[str, list[dict[str, Any]]] = {}
    for row in mine:
        if row["what"] == "cost":
            costs.setdefault(row["arm"], []).append(row)
    gradients = {row["arm"]: row for row in mine if row["what"] == "gradient"}
    draws = {row["arm"]: row for row in mine if row["what"] == "draws"}
    plain = costs["plain"]
    plain_s = min(row["step_s"] for row in plain)
    plain_mb = statistics.median(row["peak_mb"] for row in plain)
    # a chunked loss adds up in another order: its losses are compared with one another
    reference = {arm.chunked_loss: costs[name][0]["loss"] for name, arm in kinds.items()
                 if arm.kind == "plain" and name in costs}  # fmt: skip
    reference.setdefault(True, reference[False])
    arms = []
    for name in (name for name in kinds if name in costs):
        arm = kinds[name]
        arms.append({
            "arm": name, "kind": arm.kind, "ours": arm.ours, "bits": arm.bits, "stochastic": arm.stochastic,
            "chunked_loss": arm.chunked_loss,
            "peak": statistics.median(row["peak_mb"] for row in costs[name]) / plain_mb,
            "time": min(row["step_s"] for row in costs[name]) / plain_s,
            "saved": gradients[name]["saved_mb"] / gradients["plain"]["saved_mb"],
            "error": gradients[name]["error"],
            "draw": draws.get(name, {}).get("highest_single"), "mean": draws.get(name, {}).get("mean"),
            "same_loss": all(row["loss"] == reference[arm.chunked_loss] for row in costs[name]),
        })  # fmt: skip
    return {
        "shape": shape, "plain_mb": plain_mb, "plain_s": plain_s, "arms": arms,
        "noise": max(row["step_s"] for row in plain) / plain_s - 1.0,
    }  # fmt: skip


def claims_of(rows: list[dict[str, Any]], shape: str) -> list[Claim]:
    """Of each kind the arm of least memory within its bound on time; where none keeps that, the fastest."""
    told = summary(rows, shape)
    arms = told["arms"]
    levers = [arm for arm in arms if arm["ours"] and not arm["arm"].endswith("none")]
    claims: list[Claim] = []

    def best(name: str, chosen: list[dict[str, Any]], peak: float, time: float) -> dict[str, Any] | None:
        if not chosen:
            return None
        within = [arm for arm in chosen if arm["time"] <= time]
        arm = min(within, key=lambda a: a["peak"]) if within else min(chosen, key=lambda a: a["time"])
        label = f"{shape}: {name} ({arm['arm']})"
        claims.append(at_most(f"{shape}-{name}-peak", f"{label}: share of plain's peak", arm["peak"], peak))
        claims.append(
            at_most(f"{shape}-{name}-time", f"{label}: share of plain's step time", arm["time"], time)
        )
        return arm

    def error(name: str, what: str, value: float, bound: float) -> None:
        claims.append(at_most(f"{shape}-{name}", f"{shape}: {what}", value, bound))

    int8 = [a for a in levers if a["bits"] == 8 and not a["stochastic"]]
    arm = best("int8", int8, 0.27, 1.05)
    if arm:
        error("int8-error", f"gradient error of {arm['arm']}", arm["error"], 0.01)
    int4 = [a for a in levers if a["bits"] == 4 and not a["stochastic"]]
    arm = best("int4", int4, 0.18, 1.06)
    if arm:
        error("int4-error", f"gradient error of {arm['arm']}", arm["error"], 0.10)
    for arm in (a for a in levers if a["bits"] == 4 and a["draw"] is not None):
        error("int4-draw", f"gradient error of one draw, the worst, of {arm['arm']}", arm["draw"], 0.14)
        error("int4-mean", f"gradient error of the mean of 64 draws of {arm['arm']}", arm["mean"], 0.02)
    best("best", levers, 0.14, 1.15)
    points = [a for a in arms if a["kind"] == "checkpoint"]
    for point in points:
        beaten = [a for a in levers if a["peak"] <= point["peak"] and a["time"] < point["time"]]
        by = min(beaten, key=lambda a: a["peak"])["arm"] if beaten else "none"
        claims.append(
            Claim(
                f"{shape}-{point['arm'].replace(' ', '-').replace(',', '')}",
                f"{shape}: arms of ours with no more memory and less time than {point['arm']}"
                f" ({by} among them)",
                len(beaten),
                ">= 1",
                bool(beaten),
            )
        )
    changed = [a["arm"] for a in arms if not a["same_loss"]]
    claims.append(
        Claim(
            f"{shape}-loss",
            f"{shape}: arms whose loss differs by a bit {changed or ''}".strip(),
            len(changed),
            "== 0",
            not changed,
        )
    )
    return claims
