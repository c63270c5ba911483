"""The settings of prepare, train and serve, with their defaults; and presets of a model.

It must not know who uses a setting, nor how one is given (`settings`).
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, PlainValidator, field_validator, model_validator

from rayrec.errors import UsageError
from rayrec.schema import ACTIONS, ENGAGEMENTS, HEADS
from rayrec.settings import Settings, from_dict

# ---------------------------------------------------------------- prepare


class ColumnConfig(Settings):
    """How one numeric item column is repaired and scaled, in this order: filter, clip, fill, scale."""

    fill: Literal["constant", "mean", "median", "mode", "interpolate", "none"] = "median"
    constant: float = Field(0.0, description="the value that fill=constant puts in")
    drop_above: float = Field(0.95, ge=0, le=1, description="drop the column if a larger share is missing")
    clip: Literal["iqr", "zscore", "none"] = "iqr"
    clip_width: float = Field(3.0, gt=0, description="IQRs beyond the quartiles, or standard deviations")
    scale: Literal["zscore", "minmax", "robust", "log", "none"] = "log"
    smooth: Literal["median", "gaussian", "none"] = Field("none", description="noise filter, before clipping")
    smooth_width: float = Field(3, gt=0, description="window of the median in items, or sigma of the Gaussian")


class TextColumnConfig(Settings):
    """How one text column of the catalogue (category, brand) is repaired."""

    fill: Literal["constant", "mode", "none"] = "none"
    constant: str = ""
    drop_above: float = Field(0.98, ge=0, le=1, description="drop the column if a larger share is missing")
    hash_above: int = Field(100_000, ge=1, description="hash a vocabulary with more entries than this")
    hash_buckets: int = Field(65_536, ge=2)


class CleanConfig(Settings):
    """Which event rows are rejected."""

    after: str | None = Field(None, description="reject events before this time (ISO 8601 or epoch seconds)")
    before: str | None = Field(None, description="reject events at or after this time")
    bot_events_per_hour: int = Field(1000, ge=0, description="a visitor who does more is a bot; 0 is off")
    bot_min_events: int = Field(500, ge=1, description="and only visitors with at least so many events")
    max_missing: float = Field(0.5, ge=0, le=1, description="reject rows that miss a larger share of `expected`")
    expected: tuple[str, ...] = Field((), description="optional columns whose absence in a row counts as missing")
    max_abs_quantity: float = Field(100_000, gt=0)
    max_price: float = Field(1e9, gt=0)
    k_core: int = Field(0, ge=0, description="keep users and items with at least k events; 0 is off")

    @field_validator("after", "before", mode="before")
    @classmethod
    def _time_as_text(cls, value: Any) -> Any:
        """YAML makes dates and numbers of what looks like one."""
        return (
            value.isoformat() if isinstance(value, dt.date) else str(value) if isinstance(value, int | float) else value
        )


class ImageConfig(Settings):
    """How product images are decoded."""

    size: int = Field(128, ge=8, le=1024, description="height and width of the stored image, in pixels")
    fit: Literal["letterbox", "stretch"] = "letterbox"
    max_pixels: int = Field(50_000_000, ge=1, description="a larger image is refused unread (a bomb)")
    denoise: Literal["none", "median", "gaussian"] = "none"
    denoise_width: float = Field(3, gt=0, description="window of the median in pixels (odd), or sigma")


def _canonical(actions: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [action for action in actions if action not in ACTIONS]
    if unknown or not actions:
        raise ValueError(f"{', '.join(unknown) or 'none'}: choose among {', '.join(ACTIONS)}")
    return actions


Actions = Annotated[tuple[str, ...], AfterValidator(_canonical)]


class SequenceConfig(Settings):
    """What goes into a visitor's sequence."""

    actions: Actions = ENGAGEMENTS
    max_events: int = Field(10_000, ge=3, description="only a visitor's newest events are kept")


class PrepareConfig(Settings):
    """Settings of `rayrec prepare`."""

    clock: Literal["auto", "time", "date", "order"] = "auto"
    split: str = Field("loo", description="loo (leave one out by order) or time:<fraction of events to test on>")
    shards: int = Field(0, ge=0, description="partitions of the output; 0 chooses by the size of the input")
    clean: CleanConfig = CleanConfig()
    price: ColumnConfig = ColumnConfig()
    category: TextColumnConfig = TextColumnConfig()
    brand: TextColumnConfig = TextColumnConfig()
    images: ImageConfig = ImageConfig()
    sequences: SequenceConfig = SequenceConfig()

    @field_validator("split")
    @classmethod
    def _split_is_known(cls, split: str) -> str:
        if split == "loo":
            return split
        match = re.fullmatch(r"time:(0?\.\d+)", split)
        if not match or not 0 < float(match.group(1)) < 0.5:  # as much again is validation
            raise ValueError("must be 'loo' or 'time:<fraction below 0.5>', for example time:0.1")
        return split


# ---------------------------------------------------------------- train


SCRATCH = "scratch"


class ModelConfig(Settings):
    """Shape of the model. `kind` chooses the family; the rest belongs to `fusion` unless it says otherwise."""

    kind: Literal["paper", "fusion"] = "fusion"
    width: int = Field(64, ge=4, description="D, the width of item and user vectors")
    max_len: int = Field(50, ge=1, description="L, the events of history that are read (both kinds)")
    actions: Actions = Field(
        ACTIONS, description="what is read and learned from; other events count for popularity alone (both kinds)"
    )
    encoder: Literal["lstm", "gru", "transformer"] = "lstm"
    hidden_width: int = Field(128, ge=4, description="of the recurrent state, or of a transformer's inner layer")
    layers: int = Field(1, ge=1, le=8)
    heads: int = Field(2, ge=1, description="of a transformer")
    dropout: float = Field(0.3, ge=0, lt=1, description="before and after the encoder, and between its layers")
    variational: bool = Field(False, description="one dropout mask for all events of a history")
    event_dropout: float = Field(0.0, ge=0, lt=1, description="share of events hidden in a training step")
    layer_norm: bool = Field(False, description="normalise what the encoder reads")
    id_dropout: float = Field(0.1, ge=0, lt=1, description="share of items whose id is hidden in a training step")
    image_dropout: float = Field(0.0, ge=0, lt=1, description="the same of their pictures")
    attribute_dropout: float = Field(0.0, ge=0, lt=1, description="the same of all their attributes")
    image_size: int = Field(32, ge=8, description="images are averaged down to this before the CNN")
    cnn_channels: tuple[int, ...] = (16, 32, 64)
    image_backbone: str = Field(
        "scratch", description="the CNN above; or efficientnet_lite0 pretrained (an extra), or a file with its weights"
    )
    image_train: Literal["frozen", "top", "all"] = Field(
        "frozen", description="layers of a pretrained network that learn; frozen: a projection of its features alone"
    )
    use_id: bool = True
    use_image: bool = True
    use_attributes: bool = True
    use_moment: bool = Field(True, description="how long after the last event, and at which hour, a visitor asks")
    moment_dropout: float = Field(0.1, ge=0, lt=1, description="share of visitors who do not tell in a training step")
    cold_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of candidates that are ranked as if cold in a training step of the fusion"
    )
    fusion_width: int = Field(64, ge=4, description="hidden width of the fusion MLP")
    candidates: int = Field(120, ge=10, description="items of each source that the fusion re-orders")

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        if self.kind == "paper" and self.image_backbone != SCRATCH:
            raise ValueError("the paper's model has a CNN of its own; leave model.image_backbone alone")
        if self.encoder == "transformer" and self.width % self.heads:
            raise ValueError(f"model.width {self.width} must be a multiple of model.heads {self.heads}")
        return self


def _number_or_all(budget: Any) -> int | str:
    if budget == "all" or (isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0):
        return budget
    raise ValueError("must be a number from 0 on, or all")


ImageBudget = Annotated[int | Literal["all"], PlainValidator(_number_or_all)]


class TrainConfig(Settings):
    """How the model is trained."""

    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=1, description="sequences (fusion) or samples (paper) a step and worker")
    lr: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps over which the rate climbs (cosine)")
    clip_norm: float = Field(5.0, ge=0, description="longest gradient; 0 is off")
    patience: int = Field(3, ge=1, description="epochs without a better validation NDCG@10 before stopping")
    valid_users: int = Field(2000, ge=1, description="users sampled for validation after each epoch")
    image_budget: ImageBudget = Field(
        48, description="distinct images encoded with gradient a step, 0: none, all: of all that it scores"
    )
    image_refresh: int = Field(192, ge=1, description="images encoded without gradient a step, all in turn")
    image_recompute: int = Field(
        0, ge=0, description="images whose activations are held at a time, and computed again for gradients; 0: all"
    )
    image_held: Literal["all", "share"] = Field(
        "all", description="images that a worker loads; share: of its part of the shards, which alone it encodes"
    )
    image_lr: float = Field(0.03, gt=0, description="share of `lr` with which pretrained layers learn")
    cnn_lr: float = Field(0.3, gt=0, description="the same of a CNN from scratch; each of its weights moves all items")
    id_optimizer: Literal["adamw", "rowwise_adagrad"] = Field(
        "adamw", description="of the table of ids; row-wise: a step moves what it read, one number of state a row"
    )
    id_held: Literal["all", "share"] = Field(
        "all", description="rows of the table of ids that a worker holds; share: its part, the others' come as read"
    )
    id_lr: float = Field(30.0, gt=0, description="times `lr` with which rowwise_adagrad learns")
    loss: Literal["softmax", "bpr_max", "gbce"] = "softmax"
    negatives: int = Field(
        0,
        ge=0,
        description="sampled for a batch; 0: none but a softmax over all items; of many, or for other losses, 2048; "
        "4 for paper",
    )
    negative_alpha: float = Field(
        0.5, ge=0, le=1, description="negatives are drawn by popularity to this power (gbce: evenly)"
    )
    full_softmax_below: int = Field(
        15_000, ge=1, description="above this many items with training events negatives are sampled"
    )
    fusion_epochs: int = Field(6, ge=0)
    fusion_steps: int = Field(
        600,
        ge=0,
        description="of the fusion, if no epoch ends it: where lists are few, an epoch goes through them several times",
    )
    fusion_batch_size: int = Field(48, ge=1, description="lists a step and worker")
    fusion_holdout: float = Field(0.5, gt=0, lt=1, description="share of users whose last events teach the fusion")
    refit_epochs: int = Field(
        1,
        ge=0,
        description="of the first stage at last, with what was withheld; 0 is off. "
        "One that loses a twentieth of validation's figure is not kept",
    )
    refit_lr: float = Field(1e-3, gt=0, description="`lr` of these epochs")
    max_samples: int = Field(0, ge=0, description="training samples an epoch; 0 is all")
    accumulate: int = Field(1, ge=1, description="batches of each worker whose gradients make one step")
    checkpoint_s: float = Field(
        300, ge=0, description="seconds between checkpoints within an epoch; 0: at the end of epochs alone"
    )
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints within an epoch; 0: by time alone")
    bad_shards: Literal["stop", "skip"] = Field("stop", description="what a shard that cannot be read does")
    workers: int = Field(1, ge=1)
    min_workers: int = Field(
        0, ge=0, description="go on with as few while nodes are gone, batch and rate unchanged; 0: with all or not"
    )
    gpu: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    tracker: tuple[Literal["tensorboard", "mlflow"], ...] = ("tensorboard",)

    @model_validator(mode="after")
    def _no_more_than_all(self) -> TrainConfig:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not be above workers ({self.workers})")
        return self

    @property
    def batches_a_step(self) -> int:
        """Batches whose gradients make one step, of all workers together, however many of these there are just now."""
        return self.workers * self.accumulate


class Config(Settings):
    """Settings of `rayrec train`, saved in the bundle."""

    preset: str = "small"
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _pictures_can_be_shared(self) -> Config:
        if self.train.image_held == "share" and (self.model.kind == "paper" or self.model.image_backbone != SCRATCH):
            raise ValueError("train.image_held=share: only where the CNN learns from scratch, and not the paper's")
        return self

    @model_validator(mode="after")
    def _there_is_a_table(self) -> Config:
        if self.train.id_optimizer != "adamw" and (self.model.kind == "paper" or not self.model.use_id):
            raise ValueError(f"train.id_optimizer={self.train.id_optimizer}: this model has no table of ids")
        if self.train.id_held == "share" and self.train.id_optimizer != "rowwise_adagrad":
            raise ValueError("train.id_held=share needs train.id_optimizer=rowwise_adagrad, which moves rows alone")
        return self


BEFORE_IT_WAS_A_SETTING: dict[str, dict[str, Any]] = {
    "model": {"use_moment": False, "cold_dropout": 0.0},
    "train": {"cnn_lr": 1.0, "fusion_steps": 0},
}
"""What settings meant that were saved before there was one, where its default is another."""


def saved_config(tree: dict[str, Any]) -> Config:
    """The settings that a bundle or a training saved, by this version or an earlier one. Raises UsageError."""
    before = {group: {**old, **tree.get(group, {})} for group, old in BEFORE_IT_WAS_A_SETTING.items()}
    return from_dict(Config, {**tree, **before})


PRESETS: dict[str, Config] = {
    "small": Config(),
    "wide": Config(preset="wide", model=ModelConfig(width=128, hidden_width=256), train=TrainConfig(epochs=8)),
    "base": Config(
        preset="base",
        model=ModelConfig(width=128, hidden_width=256, max_len=100, image_size=64, cnn_channels=(32, 64, 128, 128)),
        train=TrainConfig(epochs=30, image_budget=256),
    ),
    "paper": Config(
        preset="paper",
        model=ModelConfig(kind="paper", max_len=50, image_size=128),
        train=TrainConfig(
            epochs=10, batch_size=32, lr=1e-3, weight_decay=0.0, schedule="constant", clip_norm=0.0, patience=10
        ),
    ),
}
"""`small`: the default, good on two cores. `wide`: better on a million events, at the same cost.
`base`: for GPUs. `paper`: the founding model to the letter.
"""


def preset(name: str) -> Config:
    """The preset called `name`. Raises UsageError, naming the others."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------- serve


class AutoscaleConfig(Settings):
    """How Ray Serve follows the load."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(8, gt=0)
    upscale_delay_s: float = Field(2, ge=0)
    downscale_delay_s: float = Field(30, ge=0)
    look_back_s: float = Field(10, gt=0, description="the load is the mean over so long")
    policy: str = Field("", description="module:Class that decides in place of target_ongoing_requests")
    policy_options: dict[str, Any] = Field({}, description="what the class is made of")

    @model_validator(mode="after")
    def _policy_is_named(self) -> AutoscaleConfig:
        if self.policy and not re.fullmatch(r"[\w.]+:\w+", self.policy):
            raise ValueError(f"policy '{self.policy}': write it as module:Class")
        if self.policy_options and not self.policy:
            raise ValueError("policy_options names no policy: set policy too")
        return self


class ItemsConfig(Settings):
    """Which items are meant: those for which all that is given holds; of several names any will do."""

    category: tuple[str, ...] = Field((), description="as in the catalogue, or one of several joined by |")
    brand: tuple[str, ...] = ()
    item: tuple[str, ...] = Field((), description="ids")
    price_min: float | None = None
    price_max: float | None = None
    new: bool | None = Field(None, description="whether hardly anyone has met them yet")

    @property
    def given(self) -> bool:
        """Whether anything is."""
        return self != type(self)()


class BoostConfig(ItemsConfig):
    """Items whose scores are multiplied: above 1 lifts them, below 1 buries them."""

    factor: float = Field(gt=0)

    @property
    def given(self) -> bool:
        """Whether anything is, but for the factor."""
        return self != type(self)(factor=self.factor)


class SceneConfig(Settings):
    """One scene: candidates, which of them may be shown, how they are scored, and what makes the list of them."""

    sources: tuple[str, ...] = ("model", "cooccurrence", "popular", "trending", "new")
    heads: dict[str, float] = Field({"next": 1.0}, description="weight of each head in a score")
    text_weight: float = Field(0.7, ge=0, le=1, description="of how well a query fits, beside taste")
    fill: bool = Field(True, description="with popular items, where the sources give too few")
    hide_seen: bool = False
    hide_purchased: bool = True
    hide_purchased_days: float | None = Field(None, gt=0, description="for so long after the purchase; None: for good")
    complements: bool = Field(False, description="leave out the categories of what is in the cart: its substitutes")
    only: ItemsConfig = Field(ItemsConfig(), description="no others are shown")
    never: tuple[ItemsConfig, ...] = Field((), description="these are not shown")
    boost: tuple[BoostConfig, ...] = ()
    pinned: dict[int, str] = Field({}, description="item ids by their place in the list, from 1")
    max_per_category: int = Field(0, ge=0, description="items of one category in a list; 0 is no limit")
    max_per_brand: int = Field(0, ge=0)
    diversity: float | None = Field(None, ge=0, le=1, description="None: as for all scenes")
    explore: float | None = Field(None, ge=0, le=1, description="None: as for all scenes")

    @model_validator(mode="after")
    def _rules_say_something(self) -> SceneConfig:
        for name in ("never", "boost"):
            if any(not rule.given for rule in getattr(self, name)):
                raise ValueError(f"a rule of '{name}' names no items: that would be all")
        if wrong := [place for place in self.pinned if place < 1]:
            raise ValueError(f"pinned place {wrong[0]}: places count from 1")
        return self

    @field_validator("heads")
    @classmethod
    def _heads_exist(cls, heads: dict[str, float]) -> dict[str, float]:
        if unknown := set(heads) - set(HEADS):
            raise ValueError(f"there is no head '{min(unknown)}': choose among {', '.join(HEADS)}")
        return heads


DEFAULT_SCENES: dict[str, SceneConfig] = {
    "home": SceneConfig(),
    "item": SceneConfig(sources=("related", "cooccurrence", "model", "popular"), hide_purchased=False),
    "cart": SceneConfig(
        sources=("together", "cooccurrence", "model", "popular"),
        heads={"cart": 0.5, "purchase": 0.5},
        complements=True,
    ),
    "search": SceneConfig(sources=("query",), fill=False, hide_purchased=False, diversity=0.0),
}


LoggedRequests: TypeAlias = Literal["errors", "all", "none"]
"""Errors are answers of 400 and above."""


class ServeConfig(Settings):
    """Settings of `rayrec serve`."""

    autoscale: AutoscaleConfig = AutoscaleConfig()
    scenes: dict[str, SceneConfig] = DEFAULT_SCENES
    trend_hours: float = Field(24, ge=0, description="what was done in these is what is on now; 0: nothing is")
    history: int = Field(100, ge=1, description="a visitor's newest events that are read")
    exact_below: int = Field(
        50_000, ge=0, description="items from which on the nearest are found by an index, which may miss some"
    )
    per_source: int = Field(150, ge=1, description="candidates asked of each source")
    remembered: int = Field(2000, ge=0, description="histories whose scores a replica keeps until something changes")
    diversity: float = Field(0.1, ge=0, le=1)
    explore: float = Field(0.0, ge=0, le=1)
    max_body_bytes: int = Field(1024 * 1024, ge=1024)
    max_ongoing_requests: int = Field(64, ge=1)
    max_queued_requests: int = Field(200, ge=1)
    batch_size: int = Field(16, ge=1, description="requests ranked together in a replica")
    deadline_s: float = Field(2.0, gt=0, description="a list that takes longer is answered by what is popular")
    clock_skew_s: float = Field(300, ge=0, description="a client's clock may be so far ahead")
    visitor_rate: float = Field(20, ge=0, description="requests a second and replica of one visitor's token; 0: any")
    key_rate: float = Field(0, ge=0, description="requests a second and replica of one key; 0 is no limit")
    newcomer_rate: float = Field(50, ge=0, description="visitors' tokens a second and replica; 0 is no limit")
    cors_origins: tuple[str, ...] = Field((), description="pages of these origins may call from a browser")
    image_prefixes: tuple[str, ...] = Field((), description="where pictures of items may be read from; each ends in /")
    audit_file: str = Field("", description="where each replica appends who read or erased whom, or changed what")
    log_requests: LoggedRequests = Field("errors", description="of which answers a replica writes a line to its log")
    log_visitors: bool = Field(False, description="with ids of visitors and items, queries and paths in the log")
    replicas_per_node: int = Field(0, ge=0, description="at most, so that a lost node is not the service; 0: any")
    replica_cpus: float = Field(1.0, gt=0, description="CPUs that a replica reserves on the cluster")

    @field_validator("image_prefixes")
    @classmethod
    def _prefixes_end(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            if not prefix.endswith("/"):  # https://cdn.shop.example would allow https://cdn.shop.example.evil.example
                raise ValueError(f"'{prefix}' must end in /")
        return prefixes
