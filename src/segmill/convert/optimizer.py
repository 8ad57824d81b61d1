"""Optimizer and schedule of MMSegmentation (MMEngine's names, and those of 0.x) as keys of ours."""

from collections.abc import Mapping
from typing import Any

from segmill.convert.table import SAME, Table, part_of, same
from segmill.errors import SegmillError

# Parts of parameters' names that mean the same here; anything longer may be called otherwise.
SHARED_NAMES = ("backbone", "neck", "head", "decode_head", "auxiliary_head")
# Keys that meet no parameter of the original: with this backbone its names have no such part.
WITHOUT_EFFECT = {
    ("MixVisionTransformer", "pos_block"),
    ("MSCAN", "pos_block"),
    ("PCPVT", "pos_block"),
    ("SVT", "pos_block"),
    ("SwinTransformer", "absolute_pos_embed"),
    ("VisionTransformer", "norm"),
}
OPTIMIZERS = {"AdamW": "segmill.optim.AdamW", "SGD": "segmill.optim.SGD"}
SCHEDULES = {"PolyLR": "Poly", "poly": "Poly", "MultiStepLR": "MultiStep", "step": "MultiStep"}
WRAPPERS = {"OptimWrapper": None, "AmpOptimWrapper": "16-mixed"}


def optimizer_and_schedule(values: Mapping[str, Any]) -> tuple[str, str]:
    """The names of our classes, for the choice of a starting point among configs/optim."""
    kind = part_of(values, f"{_optimizer(values)}.type")
    schedule = _schedule_kind(values)
    if kind not in OPTIMIZERS or schedule not in SCHEDULES:
        raise SegmillError(
            f"The optimizer is {kind!r} with the schedule {schedule!r}; known here are "
            f"{', '.join(OPTIMIZERS)} with PolyLR or MultiStepLR, after a linear warm-up. Write "
            "the recipe by hand: configs/optim has examples."
        )
    return str(kind), SCHEDULES[str(schedule)]


def convert_optimizer(table: Table) -> None:
    """Learning rate, decay, rules for parameters, clipping, mixed precision."""
    place = _optimizer(table.fields)
    table.note(f"{place}.type", SAME, str(part_of(table.ours, "optimizer._target_")))
    for theirs, ours in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        table.put(f"{place}.{theirs}", f"optimizer.{ours}", table.get(f"{place}.{theirs}"))
    table.put(f"{place}.momentum", "optimizer.momentum", table.get(f"{place}.momentum"))
    table.put(f"{place}.betas", "optimizer.betas", table.get(f"{place}.betas"))
    if not table.has(f"{place}.weight_decay"):
        table.set("optimizer.weight_decay", 0.01 if _is_adamw(table) else 0.0)  # torch's defaults
    if _is_adamw(table) and not table.has(f"{place}.betas"):
        table.set("optimizer.betas", [0.9, 0.999])
    if not _is_adamw(table) and not table.has(f"{place}.momentum"):
        table.set("optimizer.momentum", 0.0)
    table.always(f"{place}.eps", 1e-8)
    table.always(f"{place}.nesterov", False)
    _rules(table, f"{place}.paramwise_cfg" if place == "optimizer" else f"{_owner(place)}")
    _clipping(table)
    wrapper = table.get("optim_wrapper.type")
    if wrapper == "AmpOptimWrapper":
        half = table.get("optim_wrapper.dtype", "float16")
        precision = "bf16-mixed" if half == "bfloat16" else "16-mixed"
        table.put("optim_wrapper.type", "trainer.precision", precision)
        table.note("optim_wrapper.dtype", "mapped", f"trainer.precision={precision}")
        table.note("optim_wrapper.loss_scale", f"{SAME}: dynamic")
    table.always("optim_wrapper.type", "OptimWrapper")


def _is_adamw(table: Table) -> bool:
    return str(part_of(table.ours, "optimizer._target_")).endswith("AdamW")


def _owner(place: str) -> str:
    return f"{place.rpartition('.')[0]}.paramwise_cfg"


def _optimizer(values: Mapping[str, Any]) -> str:
    return "optim_wrapper.optimizer" if "optim_wrapper" in values else "optimizer"


def _rules(table: Table, place: str) -> None:
    """`custom_keys` become rules; those that neither side is sure of are marked."""
    known = dict(part_of(table.ours, "optimizer.rules") or {})
    backbone = str(part_of(table.fields, "model.backbone.type"))
    wanted: dict[str, Any] = {}
    for key, rule in (table.get(f"{place}.custom_keys") or {}).items():
        field = f"{place}.custom_keys.{key}"
        ours = {name: value for name, value in rule.items() if value != 1.0}
        if (backbone, key) in WITHOUT_EFFECT:
            table.note(field, "dropped: no parameter of the original has this in its name")
            continue
        wanted[key] = ours
        sure = key in SHARED_NAMES or same(known.get(key), ours)
        unsure = "check: a part of MMSegmentation's parameter names, which may differ here"
        table.note(field, "mapped" if sure else unsure, f"optimizer.rules.{key}={ours}")
        extra = set(rule) - {"lr_mult", "decay_mult"}
        if extra:
            raise SegmillError(f"{field} has {', '.join(sorted(extra))}; rules here have neither.")
    if not same(known, wanted):
        table.set("optimizer.rules", wanted)
    norms = table.get(f"{place}.norm_decay_mult")
    table.set("optimizer.norm_decay_mult", norms)
    table.note(f"{place}.norm_decay_mult", "mapped", f"optimizer.norm_decay_mult={norms}")
    table.note(place, "dropped: rules here know lr_mult and decay_mult of names, and of norms")


def _clipping(table: Table) -> None:
    place = "optim_wrapper.clip_grad" if "optim_wrapper" in table.fields else "optimizer_config"
    norm = place if place.startswith("optim_wrapper") else f"{place}.grad_clip"
    limit = table.get(f"{norm}.max_norm")
    table.set("trainer.clip", limit)
    table.put(f"{norm}.max_norm", "trainer.clip", limit)
    table.always(f"{norm}.norm_type", 2)
    table.note(place, SAME)


def convert_schedule(table: Table) -> None:
    """Steps, warm-up and decay."""
    if "lr_config" in table.fields:
        _old_schedule(table)
        return
    steps = "train_cfg.max_iters"
    table.put(steps, "trainer.max_steps", table.get(steps))
    table.always("train_cfg.type", "IterBasedTrainLoop")
    if not table.get(steps):
        table.note("train_cfg.max_epochs", "check: say trainer.max_steps = epochs x images / batch")
    warmup, factor = 0, 1.0
    # The warm-up first, wherever it stands: the decay is counted from its end.
    for place, each in sorted(_schedulers(table.fields), key=lambda one: not _is_warmup(one[1])):
        kind = each.get("type")
        table.always(f"{place}.by_epoch", False)
        if kind == "LinearLR":
            # What is not read stays as it is in ours.
            ours = table.ours["schedule"]
            warmup = _value(table, f"{place}.end", 0, ours["warmup_steps"])
            factor = _value(table, f"{place}.start_factor", 1 / 3, ours.get("warmup_factor"))
            table.always(f"{place}.begin", 0)
            table.always(f"{place}.end_factor", 1.0)
            table.note(place, "mapped", f"schedule.warmup_steps={warmup}, warmup_factor={factor}")
        elif kind in SCHEDULES:
            _decay(table, place, str(kind), warmup)
        else:
            raise SegmillError(f"{place}.type is {kind}: only LinearLR, PolyLR and MultiStepLR.")
    table.set("schedule.warmup_steps", warmup)
    table.set("schedule.warmup_factor", factor)


def _decay(table: Table, place: str, kind: str, warmup: int) -> None:
    begin, ours = f"{place}.begin", str(part_of(table.ours, "schedule._target_"))
    if SCHEDULES[kind] == "Poly":
        if warmup > 0 and not table.has(begin):  # then MMEngine's begin is 0
            why = "check: theirs decays during the warm-up, too; ours from its end"
            table.note(f"{place}.type", why, ours)
        _put_or_default(table, f"{place}.power", "schedule.power", 1.0)
        _put_or_default(table, f"{place}.eta_min", "schedule.min_lr", 0.0)
    else:
        # MMEngine counts milestones from the scheduler's own begin, as ours are from the warm-up.
        late = 0 if table.get(begin, 0) == warmup else warmup
        milestones = table.get(f"{place}.milestones", ())
        table.put(
            f"{place}.milestones", "schedule.milestones", [each - late for each in milestones]
        )
        _put_or_default(table, f"{place}.gamma", "schedule.gamma", 0.1)
    table.note(f"{place}.type", SAME, ours)
    table.always(begin, warmup)
    table.always(f"{place}.end", table.get("train_cfg.max_iters"))


def _put_or_default(table: Table, field: str, key: str, default: Any) -> None:
    """Our `key` is the field, MMEngine's default where the config leaves it out."""
    if table.has(field):
        table.put(field, key, table.get(field))
    else:
        table.set(key, default)


def _value(table: Table, field: str, default: Any, unread: Any) -> Any:
    return table.get(field, unread if table.has(field) else default)


def _is_warmup(scheduler: Mapping[str, Any]) -> bool:
    return scheduler.get("type") == "LinearLR"


def _schedulers(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    listed = values.get("param_scheduler")
    if isinstance(listed, Mapping):
        return [("param_scheduler", listed)]
    if not isinstance(listed, list | tuple):
        return []
    places = [(f"param_scheduler[{index}]", each) for index, each in enumerate(listed)]
    return [(place, each) for place, each in places if isinstance(each, Mapping)]


def _schedule_kind(values: Mapping[str, Any]) -> str | None:
    if "lr_config" in values:
        return part_of(values, "lr_config.policy")
    kinds = [each.get("type") for _, each in _schedulers(values)]
    return next((kind for kind in kinds if kind != "LinearLR"), None)


def _old_schedule(table: Table) -> None:
    """MMCV's: the decay counts from step 0, also where a warm-up comes first."""
    place = "lr_config"
    warmup = table.get(f"{place}.warmup_iters", 0) if table.get(f"{place}.warmup") else 0
    table.put("runner.max_iters", "trainer.max_steps", table.get("runner.max_iters"))
    table.always("runner.type", "IterBasedRunner")
    table.note(f"{place}.policy", SAME)
    for theirs, ours in (("power", "power"), ("min_lr", "min_lr"), ("gamma", "gamma")):
        table.put(f"{place}.{theirs}", f"schedule.{ours}", table.get(f"{place}.{theirs}"))
    table.set("schedule.warmup_steps", warmup)
    table.set("schedule.warmup_factor", table.get(f"{place}.warmup_ratio", 1.0) if warmup else 1.0)
    table.always(f"{place}.warmup", "linear", None)
    early = "check: MMCV's decay counts from step 0, ours from the end of the warm-up"
    table.note(f"{place}.warmup_iters", early, f"schedule.warmup_steps={warmup}")
    table.note(f"{place}.warmup_ratio", "mapped", "schedule.warmup_factor")
    table.always(f"{place}.by_epoch", False)
    milestones = table.get(f"{place}.step")
    if milestones:
        table.put(f"{place}.step", "schedule.milestones", [step - warmup for step in milestones])
