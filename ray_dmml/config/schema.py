"""The experiment: frozen, validated, one docstring a field; YAML in, YAML out; dotted overrides.

A config file states only what differs from the defaults below. ``Config.load`` merges the file and
the ``--set`` overrides, validates everything at once and reports every mistake in one message.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from ray_dmml.config import yamlio
from ray_dmml.errors import UserError

QUICKSTART = Path(__file__).parent / "quickstart.yaml"
MAX_CONFIG_BYTES = 8 * 2**20
MAX_TOLD = 20
"""Mistakes of a file that its message lists; it counts the others."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def _no_bool(value: Any) -> Any:
    """YAML's ``yes`` is True, which Python takes for 1: a count or a rate written so is a
    mistake."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _off(value: Any) -> Any:
    """YAML's ``off`` is False."""
    return "off" if value is False else value


Seed = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1e30)]  # float32 holds it
Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]


class DataConfig(Section):
    """Which images, how they are split by class, and how a batch is drawn."""

    name: Literal["characters", "cub200", "cars196", "sop", "inshop", "imagefolder", "manifest"] = (
        "characters"
    )
    """The data set. `characters` is built in and needs no file; `imagefolder` and `manifest`
    are your own."""

    root: Path | None = None
    """Folder of the images (or of the data set's unpacked archive). Not used by `characters`."""

    source: str | None = None
    """A folder or URI (as in `checkpoint.storage_path`) of which every node makes itself a copy, once and
    verified, before it reads; null: `root` is there already. The copy is in `root`, or with `root` null in
    `cache_dir`."""

    manifest: Path | None = None
    """CSV of `manifest`: columns path, label, split (train or validation), optional is_query,
    is_gallery."""

    download: bool = True
    """Fetch `cub200` into `root` where it is missing (the checksum is verified); for the others a
    message says where to get them."""

    train_fraction: Annotated[float, BeforeValidator(_no_bool), Field(gt=0, lt=1)] = 0.5
    """`imagefolder`: share of the classes that train; the others are the test classes."""

    split_seed: Seed | None = None
    """`imagefolder`: draw the training classes with this seed; null takes the first ones in
    name order."""

    validation_fraction: Fraction = 0.2
    """Share of the *training* classes held out to choose checkpoints and settings; 0 trains on
    all."""

    validation_seed: Seed = 0
    """Which training classes are held out. Independent of `seed`, so that seeds are compared on
    the same."""

    validation_fold: Whole = 0
    """Of the classes as shuffled by `validation_seed`, the next part and not the first: folds 0 to
    round(1 / validation_fraction) - 1 hold out each class once."""

    classes_per_batch: Annotated[int, BeforeValidator(_no_bool), Field(ge=2)] = 16
    """P: classes in a batch."""

    images_per_class: Annotated[int, BeforeValidator(_no_bool), Field(ge=2)] = 4
    """K: images of each class in a batch (a smaller class gives all it has)."""

    decode_size: Annotated[int, BeforeValidator(_no_bool), Field(ge=8)] = 256
    """Every image is decoded to a square of this side, in pixels, before any view is taken of
    it."""

    resize: Literal["stretch", "center_crop"] = "stretch"
    """How an image becomes square: `stretch` resizes both sides, `center_crop` resizes the shorter and
    cuts the middle."""

    on_bad_image: Literal["fail", "skip"] = "fail"
    """An unreadable image: `fail` ends the run and names it, `skip` leaves it out and says how
    many."""

    check_images: bool = True
    """Decode every image once before training, so that a corrupt one is known then and not
    hours later."""

    cache_gib: NonNegative = 8.0
    """Disk for decoded images, in GiB, of all data sets together: they are decoded once and shared
    by all peers and runs of a machine. What does not fit is decoded at every use; 0 keeps none."""

    cache_dir: Path | None = None
    """Folder of the decoded images; null: `ray-dmml` in `$XDG_CACHE_HOME` or `~/.cache`. What was
    unused longest goes first where all data sets together exceed `cache_gib`."""

    @model_validator(mode="after")
    def _has_its_files(self) -> DataConfig:
        if self.name != "characters" and self.root is None and self.source is None:
            raise ValueError(
                f"data.name '{self.name}' needs data.root, the folder of its images, or data.source, "
                "from where they are copied"
            )
        if self.name == "characters" and self.source is not None:
            raise ValueError("data.name 'characters' is built in and has no data.source")
        if self.on_bad_image == "skip" and not self.check_images:
            raise ValueError(
                "on_bad_image: skip needs check_images: true, which finds the bad ones beforehand"
            )
        if self.name == "manifest" and self.manifest is None:
            raise ValueError("data.name 'manifest' needs data.manifest, the CSV file")
        return self


class Transform(Section):
    """One transform of torchvision.transforms.v2."""

    name: str
    """Its class name, such as RandomResizedCrop."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Its constructor's arguments. `size` is the peer's input size unless given."""


class OptimizerConfig(Section):
    """How one peer learns."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimiser."""

    lr: Rate = 1e-4
    """Learning rate of the backbone (0 leaves the backbone as it is)."""

    head_lr: Rate | None = None
    """Learning rate of the embedding head; null: `lr`."""

    loss_lr: Rate | None = None
    """Learning rate of the metric loss's own parameters (proxies, centres); null: 100 times
    `lr`."""

    weight_decay: NonNegative = 1e-5
    """L2 penalty (adam, sgd) or decoupled decay (adamw)."""

    momentum: Fraction = 0.9
    """Momentum of sgd; not used by the others."""

    clip_norm: Positive | None = None
    """Gradients of the net are scaled down to this total L2 norm; null: not clipped."""


class ScheduleConfig(Section):
    """The factor on every learning rate of a peer, as a function of the step."""

    name: Literal["constant", "step", "cosine"] = "constant"
    """`step` multiplies by `gamma` at each milestone; `cosine` falls to 0 at `steps`."""

    warmup_steps: Whole = 0
    """Linear rise over the first steps."""

    milestones: tuple[Count, ...] = ()
    """Steps at which `step` multiplies the rates by `gamma`."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor of `step`."""

    steps: Count | None = None
    """The step at which `cosine` reaches 0, usually train.steps; stated apart, so that
    extending a run changes nothing before it."""

    cycles: Count = 1
    """`cosine` falls so many times within `steps`, from the full rate each time (snapshot
    ensembles)."""

    @model_validator(mode="after")
    def _has_its_settings(self) -> ScheduleConfig:
        if self.name == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones, such as [200, 400]")
        if self.name == "cosine" and self.steps is None:
            raise ValueError("schedule 'cosine' needs steps, usually those of train.steps")
        return self


class EmaConfig(Section):
    """An exponential moving average of a peer's weights."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Kept share of the average at each update."""

    as_teacher: bool = False
    """Teach with the averaged weights instead of the live ones."""


class PeerConfig(Section):
    """One peer network: what it is, what it sees, how often and how it learns."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None
    """Its name in tables, logs and files; null: peer0, peer1, ... by position."""

    seed: Seed | None = None
    """With the run's seed, the source of all its random draws; null: its position. Its numbers
    follow this seed, not its position."""

    init_seed: Seed | None = None
    """Seed of its initial weights; null: `seed`. Give peers the same one to start them equal."""

    backbone: str = "tf_efficientnet_lite0"
    """Any timm model name."""

    weights: str = "none"
    """`none`, `pretrained` (timm downloads them), `offline` (ImageNet's of tf_efficientnet_lite0, 1 and 2,
    from the extra offline-weights), or a file: backbone weights, or a peer's weights.safetensors of
    another run."""

    embedding_size: Count = 128
    """D: numbers in an embedding."""

    pooling: Literal["avg", "avgmax"] = "avg"
    """Average of the feature map, or average plus maximum."""

    batch_norm: Literal["frozen", "train"] = "frozen"
    """`frozen` keeps BatchNorm's statistics as loaded (for fine-tuning); `live` learns them."""

    input_size: Annotated[int, BeforeValidator(_no_bool), Field(ge=8)] | None = None
    """Side of the square the net sees, in pixels; null: the backbone's own."""

    view: Annotated[
        Annotated[Literal["weak", "standard", "strong"], Tag("preset")]
        | Annotated[tuple[Transform, ...], Tag("list")],
        Discriminator(lambda value: "preset" if isinstance(value, str) else "list"),
    ] = "standard"
    """Its augmentation of the training images: a preset, or a list of torchvision v2 transforms."""

    eval_crop: Annotated[float, Field(ge=0.1, le=1)] | None = None
    """Share of the side kept by the centre crop in evaluation; null: the backbone's own (often
    0.875)."""

    update_interval: Count = 1
    """k: the optimiser steps at every k-th batch."""

    update_mode: Literal["accumulate", "skip"] = "accumulate"
    """The other k-1 batches: `accumulate` averages their gradients, `skip` only publishes
    embeddings."""

    frozen: bool = False
    """It teaches and never learns (its weights must come from a file that includes the head)."""

    ema: EmaConfig | None = None
    """Keep an exponential moving average of its weights; null: none."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Its optimiser and learning rates."""

    schedule: ScheduleConfig = ScheduleConfig()
    """How its learning rates change over the run."""

    amp: Annotated[Literal["off", "bfloat16", "float16"], BeforeValidator(_off)] = "off"
    """Mixed precision of the net (losses stay in float32); float16 needs a GPU."""

    channels_last: bool = True
    """Memory layout of the net (faster for convolutions on CPUs and newer GPUs)."""

    compile: bool = False
    """Compile the net's training pass with torch.compile. The first step takes a minute or two
    longer, for which the others wait (cohort.start_timeout_s); on a CPU it needs a C++ compiler.
    Numbers change: rounding, and what dropout draws."""

    num_gpus: NonNegative | None = None
    """Its GPUs, all of one node: a fraction shares one with other peers; 2 and more share each batch
    (`replicas`); null: what the cluster has, shared out evenly, at most one."""

    num_cpus: Positive | None = None
    """Its CPUs, all of one node; null: what the cluster has, shared out evenly."""

    replicas: Count | None = None
    """Processes that share each batch of the peer, with even parts of its GPUs and CPUs; null: one for
    each of its GPUs. With frozen batch_norm they learn what one would from the whole batch."""

    resources: dict[str, Positive] = Field(default_factory=dict)
    """What else its node must have: resources by the names that the cluster gives them, such as
    `accelerator_type:A100: 0.001`."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that its node must have, such as `ray.io/accelerator-type: H100`."""

    @property
    def num_replicas(self) -> int:
        return self.replicas or max(1, int(self.num_gpus or 1))

    @model_validator(mode="after")
    def _has_gpus_for_its_replicas(self) -> PeerConfig:
        if self.num_gpus is None:
            return self
        several = self.num_replicas > 1 and self.num_gpus > 0
        if self.num_gpus > self.num_replicas or (several and self.num_gpus != self.num_replicas):
            raise ValueError(
                f"num_gpus {self.num_gpus:g} on {self.num_replicas} replicas: one has a GPU or a part of "
                "one, several have a GPU each (NCCL takes no two of one), so num_gpus above 1 must be a "
                "whole number, and replicas the same or null"
            )
        return self

    @model_validator(mode="after")
    def _frozen_has_weights(self) -> PeerConfig:
        if self.frozen and self.weights in ("none", "pretrained", "offline"):
            raise ValueError(
                "a frozen peer needs weights from a file that includes its head "
                "(RUN/checkpoints/step-.../PEER/weights.safetensors), "
                f"not weights: {self.weights}"
            )
        if self.frozen and self.ema is not None:
            raise ValueError("a frozen peer never changes, so it has nothing to average")
        return self


def _deep_merge(base: Any, over: Any) -> Any:
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = _deep_merge(base[key], value) if key in base else value
        return merged
    return over


class CohortConfig(Section):
    """The peers and how they exchange embeddings."""

    peers: tuple[PeerConfig, ...] = (
        PeerConfig(name="peer0", seed=0, init_seed=0),
        PeerConfig(name="peer1", seed=1, init_seed=1),
    )
    """One entry a peer. With `cohort.base` in the file, an entry states only what differs from
    it."""

    transport: Literal["direct", "coordinator"] = "direct"
    """`direct`: the coordinator forms a torch.distributed group and embeddings go from peer to
    peer; `coordinator`: it carries them itself."""

    max_teachers: Count | None = None
    """A peer learns at each step from at most so many others, drawn by seed and step; null: from
    all. Keeps the cost of a peer constant in large cohorts."""

    placement_strategy: Literal["pack", "spread"] = "pack"
    """`pack`: peers on as few nodes as can be, so that embeddings stay near; `spread`: on as many, so
    that a lost node takes few of them."""

    placement_timeout_s: Positive = 1800.0
    """The longest wait, in seconds, for the cluster to have room for the peers: for nodes that are
    being started, or for the end of others' work."""

    start_timeout_s: Positive = 300.0
    """The longest wait, in seconds, for the cluster to start the peers, and for their first step."""

    threads_per_peer: Count | None = None
    """torch threads of a peer; null: its CPUs (at least 1). The bits of a result on a CPU
    depend on it."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        raw = dict(raw)
        base = raw.pop("base", None)
        peers = raw.get("peers")
        if base is not None:
            if not isinstance(base, Mapping):
                raise ValueError("cohort.base must be a mapping of peer settings")
            if peers is None:
                peers = [{}, {}]
        if isinstance(peers, (list, tuple)):
            expanded = []
            for position, peer in enumerate(peers):
                if peer is None:  # "- " in YAML: the base as it is
                    peer = {}
                if isinstance(peer, PeerConfig):
                    peer = peer.model_dump(exclude_unset=True)
                if isinstance(peer, Mapping):
                    peer = _deep_merge(base or {}, peer)
                    if peer.get("name") is None:
                        peer["name"] = f"peer{position}"
                    if peer.get("seed") is None:
                        peer["seed"] = position
                    if peer.get("init_seed") is None:
                        peer["init_seed"] = peer["seed"]
                expanded.append(peer)
            raw["peers"] = expanded
        return raw

    @model_validator(mode="after")
    def _peers_differ(self) -> CohortConfig:
        names = [peer.name for peer in self.peers]
        if "ensemble" in names:
            raise ValueError("no peer may be named ensemble: that is what all of them are together")
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"peer names must be unique; used twice: {', '.join(twice)}")
        alike: dict[str, str | None] = {}
        for peer in self.peers:
            settings = peer.model_dump_json(exclude={"name"})
            if settings in alike and not peer.frozen:
                raise ValueError(
                    f"{alike[settings]} and {peer.name} have the same seed and settings and would "
                    "stay the same network: give one another seed"
                )
            alike.setdefault(settings, peer.name)
        if not self.peers:
            raise ValueError("peers is empty: a cohort has at least one peer")
        if all(peer.frozen for peer in self.peers):
            raise ValueError("every peer is frozen: at least one must learn")
        return self


class MinerConfig(Section):
    """Which pairs or triplets of a batch the metric loss sees."""

    name: str
    """`DistanceWeightedNegativeMiner` (ours) or a class of pytorch_metric_learning.miners."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Its constructor's arguments."""


TRIPLET_DEFAULTS: dict[str, Any] = {
    "args": {"margin": 0.2},
    "miner": {"name": "DistanceWeightedNegativeMiner"},
    "reducer": "MeanReducer",
}


class MetricLossConfig(Section):
    """A peer's own metric loss, from pytorch-metric-learning."""

    name: str = "TripletMarginLoss"
    """A class of pytorch_metric_learning.losses."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Its constructor's arguments; num_classes and embedding_size are filled in where it asks
    for them. TripletMarginLoss: margin 0.2 unless given."""

    miner: MinerConfig | None = None
    """Its miner; null: none. TripletMarginLoss: distance-weighted negatives unless given."""

    reducer: str | None = None
    """A class of pytorch_metric_learning.reducers; null: the loss's own. TripletMarginLoss:
    MeanReducer unless given."""

    @model_validator(mode="before")
    @classmethod
    def _triplet_defaults(cls, raw: Any) -> Any:
        """The defaults belong to the default loss: another loss starts from the library's own."""
        if isinstance(raw, Mapping) and raw.get("name", "TripletMarginLoss") == "TripletMarginLoss":
            given = {k: v for k, v in raw.items() if k != "args" or v is not None}
            args = _deep_merge(TRIPLET_DEFAULTS["args"], given.pop("args", {}))
            return {**TRIPLET_DEFAULTS, **given, "args": args}
        return raw


class RelationalConfig(Section):
    """Relational distillation against the other peers."""

    distance_weight: NonNegative = 1.0
    """w_d: weight of the distance term."""

    angle_weight: NonNegative = 2.0
    """w_a: weight of the angle term."""

    normalize: bool = True
    """Compare embeddings of unit length, as retrieval uses them; false compares them as the heads give
    them, so that their lengths are part of the geometry. The metric loss always gets unit length."""

    warmup_steps: Whole = 0
    """Both weights rise linearly from 0 over so many steps."""


class LossConfig(Section):
    """metric + mean over the peers it learns from of (w_d * distance + w_a * angle)."""

    metric: MetricLossConfig = Field(default_factory=lambda: MetricLossConfig.model_validate({}))
    """The metric loss of every peer."""

    relational: RelationalConfig = RelationalConfig()
    """The mutual term."""


class TrainConfig(Section):
    """The loop."""

    steps: Count = 1000
    """Batches that every peer sees."""

    init_from: Path | None = None
    """Folder of a run whose weights (best, else last) the peers of the same names start from."""

    log_every: Count = 10
    """Steps between two reports of progress (metrics.jsonl has every step)."""

    evaluate_every: Whole = 100
    """Steps between two evaluations on the validation classes; 0: only at the end."""

    monitor: Literal["ensemble", "mean_peer"] = "ensemble"
    """Whose validation Recall@1 makes a checkpoint the best."""

    tensorboard: bool = True
    """Write TensorBoard events into RUN/tensorboard."""


class CheckpointConfig(Section):
    """What is kept, so that nothing is lost."""

    every_steps: Whole = 100
    """Steps between two checkpoints, which is also the most that a lost peer costs; 0: only before
    the first step and after the last."""

    num_to_keep: Count = 2
    """The last so many are kept, and besides the best on the validation classes. The one before the
    last is there for a last one that turns out to be damaged."""

    storage_path: str | None = None
    """Folder or URI (`s3://bucket/folder`, `gs://`, a mount) that each checkpoint is copied to, with
    what else the run has written; `--resume` takes it, too. null: the run's folder alone."""


class FailureConfig(Section):
    """What happens when something fails."""

    on_peer_loss: Literal["restart", "drop", "fail"] = "restart"
    """A peer died or fell silent: `restart` starts it anew and all go back to the last checkpoint;
    `drop` does so, too, and goes on without the peer once `max_failures` are used up (it comes back
    at the next `--resume`); `fail` ends the run."""

    max_failures: Whole = 5
    """Restarts of peers in a run, all together; past that the run ends with its checkpoint intact."""

    node_timeout_s: Positive = 10.0
    """Seconds within which a lost node is noticed, where the run starts Ray itself; a cluster has
    settings of its own. A lost process is noticed at once."""

    heartbeat_timeout_s: Positive = 60.0
    """A peer that neither advances nor answers for so long, or for ten median steps if that is
    longer, is stuck: it is named, killed, and treated as lost."""

    on_nonfinite: Literal["fail", "skip"] = "fail"
    """A loss, gradient or embedding is NaN or infinite: `fail` ends the run, `skip` leaves out the
    update of that peer, and what it published does not reach the others."""

    max_consecutive_nonfinite: Count = 10
    """`skip`: so many batches one after the other are left out by a peer before the run ends."""


class EvaluationConfig(Section):
    """How embeddings are judged."""

    recall_at: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """The K of Recall@K."""

    batch_size: Count = 128
    """Images embedded at a time."""

    weights: Literal["last", "best", "ema"] | None = None
    """Which weights the run's test result uses; null: best where validation classes are held
    out, else last."""

    split: Literal["test", "validation"] = "test"
    """Classes of the final evaluation. Searches use `validation`, because they must not see the test
    classes."""

    untrained: bool = True
    """Evaluate the untrained peers on the test classes too, as the figure to stand beside."""


class Config(Section):
    """A whole experiment."""

    seed: Seed = 0
    """Everything random in a run follows from this and the peers' own seeds."""

    data: DataConfig = DataConfig()
    """Images, splits, batches."""

    cohort: CohortConfig = CohortConfig()
    """The peers."""

    loss: LossConfig = LossConfig()
    """What they minimise."""

    train: TrainConfig = TrainConfig()
    """For how long."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """And how they are judged."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept of it on the way."""

    failure: FailureConfig = FailureConfig()
    """What happens when something fails."""

    @model_validator(mode="after")
    def _can_be_judged(self) -> Config:
        if self.evaluation.split == "validation" and not self.data.validation_fraction:
            raise ValueError(
                "evaluation.split is validation, but data.validation_fraction is 0: there are no "
                "validation classes"
            )
        return self

    @model_validator(mode="after")
    def _weights_will_exist(self) -> Config:
        try:
            self.weights_to_judge()
        except UserError as error:
            raise ValueError(f"evaluation.weights: {error}") from None
        return self

    def weights_to_judge(self, asked: str | None = None) -> str:
        """``last``, ``best`` or ``ema``: those asked for, or those the run is judged by (which
        are never chosen on the test classes).

        Raises:
            UserError: the run has no such weights.
        """
        allowed = ["last"]
        if self.data.validation_fraction:
            allowed.append("best")
        if any(peer.ema for peer in self.cohort.peers):
            allowed.append("ema")
        usual = "best" if "best" in allowed else "last"
        which = asked or self.evaluation.weights or usual
        if which not in allowed:
            raise UserError(
                f"there are no weights {which!r}; there are {' and '.join(allowed)} (best needs "
                "data.validation_fraction above 0, ema a peer that keeps one)"
            )
        return which

    @classmethod
    def load(cls, path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
        """Reads a YAML file (none: the built-in quickstart) and applies `KEY=VALUE` overrides.

        Relative paths in the file are relative to its folder; those in overrides to the current one.

        Raises:
            UserError: the file is missing or no YAML, or settings are unknown or out of range; all are listed.
        """
        path = QUICKSTART if path is None else Path(path)
        raw = read_settings(path, overrides)
        return cls.parse(raw, source=f"{path} with --set" if overrides else str(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], source: str = "config") -> Config:
        """Validates a nested mapping.

        Raises:
            UserError: naming every wrong setting, what was given and what is allowed.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise UserError(explain(error, source, raw=raw)) from None

    def to_yaml(self) -> str:
        """The effective config, every field stated; `Config.load` of it gives this config again."""
        return yamlio.dump(self.model_dump(mode="json"))


def read_settings(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The settings of a YAML file with `KEY=VALUE` overrides, paths absolute, not yet validated.

    Raises:
        UserError: the file is missing or no YAML, or an override names no place.
    """
    raw = read_yaml(path)
    try:
        _resolve_paths(raw, path.parent.resolve())
        for override in overrides:
            key, equals, text = override.partition("=")
            source = f"--set {_shown(override)}"
            if not equals or not key:
                raise UserError(f"{source}: write KEY=VALUE, such as train.steps=500")
            if key.count(".") >= yamlio.MAX_DEPTH:
                raise UserError(f"{source}: a key has at most {yamlio.MAX_DEPTH} parts")
            try:
                value = yamlio.load(text)
            except yamlio.YAMLError as error:
                raise UserError(f"{source}: the value is not valid YAML: {error}") from None
            set_setting(raw, key, value, source)
        _resolve_paths(raw, Path.cwd())
    except RuntimeError as error:  # of ~somebody, who is not known here
        raise UserError(f"config file {path}: a path in it cannot be resolved: {error}") from None
    return raw


MOVED = {
    "train.checkpoint_every": "checkpoint.every_steps",
    "cohort.exchange_timeout_s": "failure.heartbeat_timeout_s",
}
"""Settings of runs that an older version wrote, and what they are now."""


def moved(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings of an older version's run as they are now, in place."""
    for old, new in MOVED.items():
        section, key = old.split(".")
        inside = raw.get(section)
        if isinstance(inside, dict) and key in inside:
            set_setting(raw, new, inside.pop(key), old)
    return raw


def read_yaml(path: Path, what: str = "config file") -> dict[str, Any]:
    """The mapping in a YAML file of a reasonable size; ``what`` names the file in errors.

    Raises:
        UserError: it is missing, or not that.
    """
    try:
        with path.open("rb") as file:  # which may be a pipe, or have no end
            content = file.read(MAX_CONFIG_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise UserError(f"{what} {path} is larger than {MAX_CONFIG_BYTES // 2**20} MiB")
    try:
        raw = yamlio.load(text)
    except yamlio.YAMLError as error:
        raise UserError(f"{what} {path} is not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(
            f"{what} {path} must hold settings (key: value), not a {type(raw).__name__}"
        )
    return raw


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Makes relative paths absolute, in place."""

    def absolute(section: Any, key: str) -> None:
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and value:
            section[key] = str(folder / Path(value).expanduser())

    absolute(raw.get("data"), "root")
    data = raw.get("data")
    if isinstance(data, dict) and "://" not in str(data.get("source")):
        absolute(data, "source")
    absolute(raw.get("data"), "manifest")
    absolute(raw.get("data"), "cache_dir")
    absolute(raw.get("train"), "init_from")
    cohort = raw.get("cohort")
    if isinstance(cohort, dict):
        peers = cohort.get("peers")
        for peer in [cohort.get("base"), *(peers if isinstance(peers, list) else [])]:
            if isinstance(peer, dict) and peer.get("weights") not in (
                "none",
                "pretrained",
                "offline",
            ):
                absolute(peer, "weights")


def dotted(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys, as `set_setting` takes them; what is empty stays whole."""
    pairs = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
    found: dict[str, Any] = {}
    for key, value in pairs:
        if isinstance(value, (Mapping, list)) and value:
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def set_setting(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Sets one of a config file's settings by its dotted key, in place.

    Raises:
        UserError: there is no such place, or the value would do nothing there; ``source`` is named.
    """
    parts = key.split(".")
    _refuse_hidden_base(raw, parts, source)
    if parts[:2] == ["cohort", "peers"] and len(parts) > 2:
        # The default peers, or those a base implies, are written out before one of them is changed.
        cohort = raw.setdefault("cohort", {})
        if isinstance(cohort, dict) and cohort.get("peers") is None:
            cohort["peers"] = [{}, {}]
    node: Any = raw
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"{source}: {where} has entries 0 to {len(node) - 1}, not {part!r}")
            index = int(part)
            if last:
                node[index] = value
            else:
                if node[index] is None:
                    node[index] = {}
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise UserError(f"{source}: {where} is {node!r} and has no settings of its own")


def _refuse_hidden_base(raw: dict[str, Any], parts: list[str], source: str) -> None:
    """A setting of the base that every peer states itself would do nothing; a run's saved config
    states all of them."""
    cohort = raw.get("cohort")
    peers = cohort.get("peers") if isinstance(cohort, dict) else None
    of_base = parts[:2] == ["cohort", "base"] and len(parts) > 2
    if not of_base or not isinstance(peers, list) or not peers:
        return
    if all(_states(peer, parts[2:]) for peer in peers):
        raise UserError(
            f"{source}: every peer of this config states that itself, so cohort.base does "
            f"nothing; set cohort.peers.0.{'.'.join(parts[2:])} and so on"
        )


_OF_YAML: dict[str, Any] = {"None": None, "True": True, "False": False}


def _states(settings: Any, path: list[str]) -> bool:
    """Whether the mapping has a value there; what is inside of a list is stated where the list is."""
    for part in path:
        if isinstance(settings, (list, tuple)):
            return True
        if not isinstance(settings, Mapping):
            return False
        # YAML has keys that are no text: 1, null, true. Looking for these alone keeps a large file quick.
        found = part if part in settings else _OF_YAML.get(part, part)
        if found not in settings and re.fullmatch(r"-?[0-9]{1,18}", part):
            found = int(part)
        if found not in settings:
            return False
        settings = settings[found]
    return True


def explain(
    error: ValidationError,
    source: str,
    model: type[BaseModel] | None = None,
    raw: Mapping[str, Any] | None = None,
) -> str:
    """Every mistake of a file, its place, what was given and what is allowed.

    Args:
        source: what to call the file.
        model: what it should have been; None: a :class:`Config`.
        raw: a config as it was written: what peers have from `cohort.base` is told once, and there.
    """
    mistakes: dict[tuple[str, str, str], tuple[list[str], ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        # The tags of a view's union are pydantic's, not the user's.
        parts = [str(part) for part in problem["loc"]]
        location = [
            part
            for before, part in zip(["", *parts], parts, strict=False)
            if not (before == "view" and part in ("preset", "list"))
        ]
        where = _cut(".".join(_as_written(location, raw or {}))) or "config"
        key = where, problem["type"], problem["msg"]
        mistakes.setdefault(key, (location, problem))
    told = []
    for (where, kind, message), (location, problem) in islice(mistakes.items(), MAX_TOLD):
        given = problem.get("input")
        if kind == "extra_forbidden" and where in MOVED:
            told.append(f"{where}: is {MOVED[where]} now")
        elif kind == "extra_forbidden":
            told.append(f"{where}: unknown setting; {_hint(location, model or Config)}")
        elif kind == "value_error":
            told.append(f"{where}: {problem['ctx']['error']}")
        else:
            is_long = isinstance(given, (dict, list, tuple))
            told.append(f"{where}: {message}{'' if is_long else f' (got {_shown(given)})'}")
    if len(mistakes) > MAX_TOLD:
        told.append(f"... and {len(mistakes) - MAX_TOLD} more")
    return f"{source}: " + ("" if len(told) == 1 else "\n  ") + "\n  ".join(told)


def _as_written(location: list[str], raw: Mapping[str, Any]) -> list[str]:
    """Where the mistake stands: in `cohort.base`, if the peer that has it does not state it itself."""
    cohort = raw.get("cohort") if isinstance(raw, Mapping) else None
    if location[:2] != ["cohort", "peers"] or len(location) < 3 or not isinstance(cohort, Mapping):
        return location
    peers, base, path = cohort.get("peers"), cohort.get("base"), location[3:]
    own = peers[int(location[2])] if isinstance(peers, (list, tuple)) else {}
    if path == ["init_seed"] and not _states(own, path) and not _states(base, path):
        path = ["seed"]  # which it is, if nobody says otherwise
    states_it = own not in (None, {}) and _states(own, path)
    if base and _states(base, path) and not states_it:
        return ["cohort", "base", *path]
    return [*location[:3], *path]


def _shown(given: Any) -> str:
    return _cut(repr(given))


def _cut(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


def _hint(location: list[str], model: type[BaseModel]) -> str:
    """The settings nearest to an unknown one: at its own place, or deeper or higher under the
    same name."""
    here = _section_at(location[:-1], model)
    if here is None:
        return "nothing is allowed here"
    names = [*here.model_fields, *(["base"] if here is CohortConfig else [])]
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.6)
    if not near:
        # The shallowest of that name: `steps` means train.steps before a peer's schedule.steps.
        elsewhere = sorted(
            [*_dotted_names(here), *_dotted_names(model)], key=lambda n: n.count(".")
        )
        near = [name for name in elsewhere if name.rsplit(".", 1)[-1] == location[-1]][:1]
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"


def _section_at(location: list[str], model: type[BaseModel]) -> type[BaseModel] | None:
    parts = iter(location)
    for part in parts:
        if part == "base" or part.isdigit():
            continue
        field = model.model_fields.get(part)
        inner = _sections_in(field.annotation) if field else []
        if field is None or not inner:
            return None
        model = inner[0]
        if get_origin(field.annotation) is dict:
            next(parts, None)  # whichever key it is
    return model


def _dotted_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for inner in _sections_in(field.annotation):
            names.extend(_dotted_names(inner, f"{prefix}{name}."))
    return names


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The config sections inside a field's annotation, such as PeerConfig in tuple[PeerConfig,
    ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for inner in getattr(annotation, "__args__", ()):
        found.extend(_sections_in(inner))
    return found
