"""From raw rows to one line an arm, and to what is claimed of them."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.activation_memory.arms import find_arms
from benchmarks.results import Claim, at_most

__all__ = ["claims_of", "summary"]

_WORST = 0.10
"""Gradient error of what may stand for us in a claim."""


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
            "arm": name, "kind": arm.kind, "ours": arm.ours, "levers": arm.levers,
            "bits": arm.bits, "stochastic": arm.stochastic, "chunked_loss": arm.chunked_loss,
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
    arms = summary(rows, shape)["arms"]
    # like for like: all factors are trained, and gradients are no worse than int4's may be
    levers = [
        arm for arm in arms if arm["ours"] and arm["levers"] and (arm["error"] <= _WORST or arm["stochastic"])
    ]
    claims = _cost_claims(shape, "plain", levers)
    for plain in (a for a in arms if a["kind"] == "plain" and a["arm"] != "plain"):
        claims += _cost_claims(shape, plain["arm"], [_against(arm, plain) for arm in levers])
    for arm in (a for a in levers if a["bits"] == 4 and a["draw"] is not None):
        for what, text, bound in (
            ("draw", "one draw, the worst", 0.14),
            ("mean", "the mean of 64 draws", 0.02),
        ):
            label = f"{shape}: gradient error of {text}, of {arm['arm']}"
            claims.append(at_most(f"{shape}-int4-{what}", label, arm[what], bound))
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


def _against(arm: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The same costs as shares of another plain's."""
    return {**arm, "peak": arm["peak"] / plain["peak"], "time": arm["time"] / plain["time"]}


def _cost_claims(shape: str, plain: str, levers: list[dict[str, Any]]) -> list[Claim]:
    claims: list[Claim] = []
    for name, peak, time, error in (
        ("int8", 0.27, 1.05, 0.01),
        ("int4", 0.18, 1.06, 0.10),
        ("best", 0.14, 1.15, None),
    ):
        bits = {"int8": (8,), "int4": (4,)}.get(name)
        chosen = [a for a in levers if bits is None or (a["bits"] in bits and not a["stochastic"])]
        if not chosen:
            continue
        within = [a for a in chosen if a["time"] <= time]
        arm = min(within, key=lambda a: a["peak"]) if within else min(chosen, key=lambda a: a["time"])
        label = f"{shape}: {name} ({arm['arm']})"
        id = f"{shape}-{name}" + (
            "" if plain == "plain" else "-" + plain.replace(", ", "-").replace(" ", "-")
        )
        claims.append(at_most(f"{id}-peak", f"{label}: share of the peak of {plain}", arm["peak"], peak))
        claims.append(at_most(f"{id}-time", f"{label}: share of the step time of {plain}", arm["time"], time))
        if error is not None:
            claims.append(at_most(f"{id}-error", f"{label}: gradient error", arm["error"], error))
    return claims
