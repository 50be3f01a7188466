"""The settings of an experiment: frozen, validated pydantic models with one docstring per field.

A config file states only what differs from the defaults below. `loading` reads it, and `messages` describes what is
wrong with it. The field docstrings are the reference that `ray-dmml config` prints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from ray_dmml.config import yamlio
from ray_dmml.config.loading import (
    OFFLINE_BACKBONES,
    QUICKSTART,
    Overrides,
    dotted,
    override_settings,
    read_settings,
    shorten,
)
from ray_dmml.config.messages import explain, refuse_change
from ray_dmml.config.parts import is_own, is_path
from ray_dmml.errors import UserError


class Section(BaseModel):
    """Base of all sections: frozen, with no unknown keys, and no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    extra_keys: ClassVar[Mapping[str, str]] = {}  # a file may have these, too; a validator replaces them by fields
    main_setting: ClassVar[str] = ""  # the setting that a plain value in place of the section probably means

    def __setattr__(self, name: str, value: Any) -> None:
        raise UserError(refuse_change(type(self), name, value, Config))


def _no_bool(value: Any) -> Any:
    """Refuses YAML's `yes`, which is True and which Python would accept as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _off(value: Any) -> Any:
    """Reads YAML's unquoted `off`, which is False, as text."""
    return "off" if value is False else value


def _not_empty(value: Any) -> Any:
    """Refuses an empty path, which Python would read as the current folder."""
    if value == "":
        raise ValueError("the path is empty")
    return value


FilePath = Annotated[Path, BeforeValidator(_not_empty)]
Seed = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[Seed, Field(ge=1)]
Whole = Annotated[Seed, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Rate = Annotated[Number, Field(ge=0, le=1e30)]  # fits into float32
Fraction = Annotated[Number, Field(ge=0, lt=1)]


DATA_SETS = ("characters", "cub200", "cars196", "sop", "inshop", "imagefolder", "manifest")
VIEWS = ("weak", "standard", "strong")


def _known_or_own(names: tuple[str, ...], name: str) -> str:
    if name not in names and not is_own(name):
        listed = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
        raise ValueError(f"Input should be {listed}, or your own as module:name (got {shorten(repr(name))})")
    return name


DataSetName = Annotated[str, AfterValidator(partial(_known_or_own, DATA_SETS))]
ViewName = Annotated[str, AfterValidator(partial(_known_or_own, VIEWS))]


class DataConfig(Section):
    """Which images are used, how they are split by class, and how a batch is drawn."""

    main_setting = "name"

    name: DataSetName = "characters"
    """The data set: characters, cub200, cars196, sop, inshop, imagefolder or manifest, or a function of your own, as
    `module:function` or an entry point. `characters` is built in and needs no files. `imagefolder` and `manifest` read
    your own images."""

    root: FilePath | None = None
    """Folder of the images, or of the data set's unpacked archive. `characters` does not use it. A relative path is
    relative to the folder of the config file, and with `--set` to the current folder."""

    source: Annotated[str, BeforeValidator(_not_empty)] | None = None
    """Folder or URI (as in `checkpoint.storage_path`) from which every node copies the images once and verifies them.
    The copy is in `root`, or in `cache_dir` if `root` is null. null: the images are in `root`."""

    manifest: FilePath | None = None
    """`manifest`: a CSV file with columns path and label; perhaps split (train or validation), is_query, is_gallery,
    the box of an image (x_1, x_2, y_1, y_2), category, and the column of `exclude_same`."""

    exclude_same: Annotated[str, Field(min_length=1)] | None = "sequence"
    """`manifest`: a column, such as the camera burst of a photo. In an evaluation, a query is not matched with gallery
    images that have its value, because they are too easy to find. An empty cell excludes nothing. A manifest may lack
    the column `sequence`, but no other one that is named here. null: nothing is excluded."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of a data set of your own."""

    download: bool = True
    """Download `cub200` into `root` if it is missing, and verify it. Errors say where to get other data sets."""

    split_by: Literal["class", "image"] = "class"
    """`class`: no class is in two of training, validation and test, so the figures are of classes never seen. `image`:
    they share the classes and no image, so the figures are of known classes. `imagefolder` splits each class: at least
    2 images train and 2 test, and a class of fewer than 4 only trains. In a `manifest`, a label may have rows of both
    splits, and so may a class of your own data set."""

    train_fraction: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """`imagefolder`: share of the classes used for training. The other classes are the test classes. 1: there are no
    test classes, and the run is evaluated on validation classes only, or not at all. With `split_by: image` it is the
    share of the images of each class."""

    split_seed: Seed | None = None
    """`imagefolder`: seed that selects the training classes. null: they are the first in name order. With `split_by:
    image` it selects images."""

    validation_fraction: Fraction = 0.2
    """Share of the *training* classes that is held out to select checkpoints and settings. 0: none is held out. With
    `split_by: image` it is the share of the training images of each class, at least 2; a class of fewer than 4 has no
    validation images."""

    validation_seed: Seed = 0
    """Seed that selects the held-out classes (or images), apart from `seed`: runs with other seeds have the same."""

    validation_fold: Whole = 0
    """Which part of the shuffled training classes (or images) is held out; 0 is the first. Folds 0 to round(1 /
    validation_fraction) - 1 hold out each class once."""

    classes_per_batch: Annotated[Seed, Field(ge=2)] = 16
    """P: number of classes in a batch."""

    images_per_class: Annotated[Seed, Field(ge=2)] = 4
    """K: number of images of each class in a batch. A smaller class contributes all its images."""

    micro_batch: Count | None = None
    """Number of images of a batch whose activations a device holds at a time. A peer embeds the batch in parts of at
    most so many, computes the losses on the embeddings of the whole batch, and embeds the parts again for their
    gradients. A step needs the memory of a part, and a third more time. With batch_norm train, each part is normalised
    by itself. null: all images of the batch."""

    decode_size: Annotated[Seed, Field(ge=8)] = 256
    """Every image is decoded to a square with this side, in pixels, before it is augmented."""

    resize: Literal["stretch", "center_crop"] = "stretch"
    """`stretch` resizes both sides of an image. `center_crop` resizes the shorter side and cuts out the middle."""

    on_bad_image: Literal["fail", "skip"] = "fail"
    """If an image cannot be read, `fail` ends the run and names it, and `skip` leaves it out and reports it."""

    check_images: bool = True
    """Decode every image once before training, so that a corrupt image is reported at the start."""

    cache_gib: NonNegative = 8.0
    """Disk space in GiB for the cache of decoded images, which all runs and data sets of a machine share. A data set
    that does not fit is not cached, and its images are decoded at every use. 0: nothing is cached."""

    cache_dir: FilePath | None = None
    """Folder of this cache. null: `ray-dmml` in `$XDG_CACHE_HOME` or in `~/.cache`. If all data sets together exceed
    `cache_gib`, the least recently used one is removed first."""

    @model_validator(mode="after")
    def _is_consistent(self) -> DataConfig:
        if self.args and self.name in DATA_SETS:
            raise ValueError(f"data.args are those of a data set of your own, not of '{self.name}'")
        if self.name in DATA_SETS[1:] and self.root is None and self.source is None:
            raise ValueError(f"data.name '{self.name}' needs data.root, the folder of its images, or data.source")
        if self.name == "characters" and self.source is not None:
            raise ValueError("data.name 'characters' is built in and has no data.source")
        if self.on_bad_image == "skip" and not self.check_images:
            raise ValueError("on_bad_image: skip needs check_images: true, which finds the bad images before training")
        if self.split_by == "image" and self.name in DATA_SETS and self.name not in ("imagefolder", "manifest"):
            raise ValueError(f"split_by: image is for imagefolder and manifest; '{self.name}' has its own test classes")
        if self.name == "manifest" and self.manifest is None:
            raise ValueError("data.name 'manifest' needs data.manifest, the CSV file")
        return self


class Transform(Section):
    """One transform of torchvision.transforms.v2, or of your own."""

    main_setting = "name"

    name: str
    """Class name of the transform, such as RandomResizedCrop, or `module:Class` or an entry point."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor. `size` is the peer's input size unless it is given here."""


class OptimizerConfig(Section):
    """The optimiser of one peer."""

    main_setting = "name"

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimiser."""

    lr: Rate = 1e-4
    """Learning rate of the backbone. 0: the backbone does not change."""

    head_lr: Rate | None = None
    """Learning rate of the embedding head. null: it is `lr`."""

    loss_lr: Rate | None = None
    """Learning rate of the metric loss's own parameters (proxies, centres). null: it is 100 times `lr`."""

    layer_decay: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Factor by which the learning rate falls from block to block, from the head to the stem, so that fine-tuning
    changes the first blocks least: the last block has `lr` times this factor. 0.65 to 0.9 is usual for transformers.
    null: the whole backbone has `lr`."""

    weight_decay: NonNegative = 1e-5
    """L2 penalty (adam, sgd) or decoupled weight decay (adamw). Biases, the parameters of normalisation layers, and
    what the backbone itself exempts (position embeddings, class tokens) have none."""

    momentum: Fraction = 0.9
    """Momentum of sgd. The other optimisers do not use it."""

    clip_norm: Positive | None = None
    """Maximum L2 norm of the network's whole gradient; a larger one is scaled down. null: gradients are not clipped."""


class ScheduleConfig(Section):
    """The factor that all learning rates of a peer are multiplied by, as a function of the step."""

    main_setting = "name"

    name: Literal["constant", "step", "cosine"] = "constant"
    """`step` multiplies the rates by `gamma` at each milestone. `cosine` lets them fall to 0 at `steps`."""

    warmup_steps: Whole = 0
    """Number of first steps over which the rates rise linearly."""

    milestones: tuple[Count, ...] = ()
    """Steps at which the schedule `step` multiplies the rates by `gamma`."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor of the schedule `step`."""

    steps: Count | None = None
    """Step at which `cosine` reaches 0, usually train.steps. A longer run then does not change the steps before."""

    cycles: Count = 1
    """How many times `cosine` falls within `steps`, from the full rate each time, as snapshot ensembles do."""

    @model_validator(mode="after")
    def _is_consistent(self) -> ScheduleConfig:
        if self.name == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones, such as [200, 400]")
        if self.name == "cosine" and self.steps is None:
            raise ValueError("schedule 'cosine' needs steps, usually those of train.steps")
        return self


class EmaConfig(Section):
    """An exponential moving average of a peer's weights."""

    main_setting = "decay"

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the average that is kept at each update."""

    as_teacher: bool = False
    """Publish the embeddings of the averaged weights, not of the current ones, to the other peers."""


class LoraConfig(Section):
    """Low-rank adapters beside layers of a backbone that keeps its weights. They need the extra `lora` (peft)."""

    main_setting = "rank"

    rank: Count = 8
    """Rank of the adapters."""

    alpha: Positive = 16.0
    """What an adapter adds to its layer is multiplied by alpha / rank."""

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("qkv", "attn.proj", "fc1", "fc2")
    """Ends of the names of the linear and convolutional layers that have an adapter. The default names those of most
    transformers in timm."""


class PeerConfig(Section):
    """One peer: its network, its view of the images, how often it updates, and its resources."""

    main_setting = "backbone"

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None
    """Name of the peer in tables, logs and files. null: it is peer0, peer1, ... by position."""

    seed: Seed | None = None
    """Seed of the peer. With the run's seed it determines all random numbers of the peer, whatever its position. null:
    it is the position of the peer."""

    init_seed: Seed | None = None
    """Seed of the initial weights. null: it is `seed`. Peers with the same one start with equal weights."""

    backbone: str = "tf_efficientnet_lite0"
    """Name of the network. Any timm model name is allowed, also with a tag of its weights, such as
    `vit_small_patch14_dinov2.lvd142m`, and `hf-hub:OWNER/NAME` for a timm model on the Hugging Face hub. A
    network of your own is `module:Class` or an entry point."""

    backbone_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a backbone of your own."""

    weights: Annotated[str, BeforeValidator(_not_empty)] = "none"
    """Initial weights. `none`: random ones. `pretrained`: timm downloads them. `offline`: ImageNet's for
    tf_efficientnet_lite0, 1 and 2, from the extra offline-weights. Else a file: weights of the backbone as they were
    published, or a peer's weights.safetensors of another run. A classifier in the file is not used. All other layers
    must be in both the file and the network."""

    embedding_size: Count = 128
    """D: number of dimensions of an embedding. That of a frozen peer is given by its weights."""

    pooling: Literal["native", "avg", "max", "avgmax", "token", "gem"] = "native"
    """`native` is what the backbone was trained with. `avg` averages the feature map, or the tokens of the patches.
    `max` takes the maximum, `avgmax` the mean of both, `gem` the generalised mean with p = 3, and `token` the class
    token. Layers that the backbone was trained with stay, or the pooling is refused."""

    batch_norm: Literal["frozen", "train"] = "frozen"
    """`frozen` keeps the loaded statistics of BatchNorm, for fine-tuning. `train` updates them."""

    input_size: Annotated[Seed, Field(ge=8)] | None = None
    """Side, in pixels, of the square that the network receives. null: it is the backbone's own. A transformer needs a
    multiple of its patch size; its position embeddings are resampled."""

    view: Annotated[
        Annotated[ViewName, Tag("preset")] | Annotated[tuple[Transform, ...], Tag("list")],
        Discriminator(lambda value: "preset" if isinstance(value, str) else "list"),
    ] = "standard"
    """Augmentation of the training images: weak, standard, strong, or `module:Class`, or a list of transforms of
    torchvision v2 and of your own."""

    eval_crop: Annotated[float, Field(ge=0.1, le=1)] | None = None
    """Share of the side that the centre crop keeps in evaluation. null: it is the backbone's own, often 0.875."""

    update_interval: Count = 1
    """k: the optimiser steps at every k-th batch."""

    update_mode: Literal["accumulate", "skip"] = "accumulate"
    """At the k-1 batches between, `accumulate` averages the gradients, and `skip` only publishes embeddings."""

    frozen: bool = False
    """The peer teaches and does not learn. With `weights` of a backbone alone (`pretrained`, `offline`, a file) it
    teaches with the pooled features of the backbone; with a peer's weights.safetensors, with that peer's embeddings."""

    teacher_view: Literal["own", "evaluation"] = "own"
    """What a frozen peer embeds. `own`: its `view` of each batch. `evaluation`: the evaluation view of every training
    image, once before training; it then takes no time at a step."""

    freeze_blocks: (
        Annotated[
            Annotated[Whole, Tag("number")] | Annotated[Literal["all"], Tag("name")],
            Discriminator(lambda value: "name" if isinstance(value, str) and not value.isdigit() else "number"),
        ]
        | None
    ) = None
    """Number of first blocks of the backbone that keep their initial weights, together with the stem: blocks of a
    transformer, stages of a convolutional net. `all`: the whole backbone; only the head learns. null: none."""

    lora: LoraConfig | None = None
    """Train low-rank adapters and the head, and keep the weights of the backbone. null: there are no adapters."""

    ema: EmaConfig | None = None
    """Keep an exponential moving average of the peer's weights. null: no average is kept."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and learning rates of the peer."""

    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rates change during the run."""

    amp: Annotated[Literal["off", "bfloat16", "float16"], BeforeValidator(_off)] = "off"
    """Mixed precision of the network. The losses stay in float32. float16 needs a GPU."""

    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them, which needs less memory and takes a
    third longer. It is the backbone's own method set_grad_checkpointing, which most of timm's have."""

    channels_last: bool = True
    """Use the channels-last memory layout, which makes convolutions faster on CPUs and newer GPUs."""

    compile: bool = False
    """Compile the training pass with torch.compile. The first step then takes one to two minutes more (see
    cohort.start_timeout_s). A CPU needs a C++ compiler. Results differ by rounding and by what dropout draws."""

    num_gpus: NonNegative | None = None
    """Number of GPUs, all on one node. A fraction shares a GPU with other peers. 2 or more split each batch (see
    `replicas`). null: the GPUs of the cluster are divided evenly, at most one per peer."""

    num_cpus: Positive | None = None
    """Number of CPUs, all on one node. null: the CPUs of the cluster are divided evenly."""

    replicas: Count | None = None
    """Number of processes that share each batch of the peer and divide its GPUs and CPUs evenly. null: one for each
    GPU. With frozen batch_norm they learn what one process would learn from the whole batch."""

    num_workers: Whole | None = None
    """Number of processes that make the views of the peer ahead of its steps, and those of evaluation. They share the
    CPUs of the peer. 0: the peer makes them itself. null: the peer's CPUs less one if it is on a GPU, else 0."""

    resources: dict[str, Positive] = Field(default_factory=dict)
    """Other resources that the peer's node must have, by name, such as `accelerator_type:A100: 0.001`."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the peer's node must have, such as `ray.io/accelerator-type: H100`."""

    @property
    def num_replicas(self) -> int:
        return self.replicas or max(1, int(self.num_gpus or 1))

    @model_validator(mode="after")
    def _is_consistent(self) -> PeerConfig:
        gpus, replicas = self.num_gpus or 0, self.num_replicas
        if gpus > replicas or (replicas > 1 and gpus not in (0, replicas)):
            raise ValueError(
                f"num_gpus {gpus:g} does not fit {replicas} replicas. One replica has a GPU or a part of "
                "one; several have a GPU each, because NCCL allows no two processes on one. If num_gpus "
                "is above 1, it must be a whole number, and replicas the same or null"
            )
        if self.backbone_args and not is_own(self.backbone):
            raise ValueError(f"backbone_args are those of a backbone of your own, not of {self.backbone}")
        if self.weights in ("pretrained", "offline") and is_path(self.backbone):
            raise ValueError(
                f"weights: {self.weights} are those of timm's networks; {self.backbone} may load its own when it is "
                "built, or give a file"
            )
        if self.weights == "offline" and self.backbone not in OFFLINE_BACKBONES:
            names = ", ".join(OFFLINE_BACKBONES)
            raise ValueError(f"weights: offline are those of {names}; {self.backbone} needs pretrained or a file")
        if self.frozen and self.weights == "none" and not is_own(self.backbone):
            raise ValueError("a frozen peer never learns, so it needs weights: pretrained, offline or a file")
        if self.teacher_view == "evaluation" and not self.frozen:
            raise ValueError("teacher_view: evaluation needs frozen: true; the embeddings of other peers change")
        if self.frozen and self.ema is not None:
            raise ValueError("a frozen peer never changes, so it has nothing to average")
        if self.frozen and (self.freeze_blocks is not None or self.lora is not None):
            raise ValueError("a frozen peer never changes: it has no freeze_blocks and no lora")
        if self.freeze_blocks is not None and self.lora is not None:
            raise ValueError("lora freezes all blocks of the backbone: give freeze_blocks or lora")
        return self


def _deep_merge(base: Any, over: Any) -> Any:
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {**base, **{key: _deep_merge(base.get(key), value) for key, value in over.items()}}
    return over


class CohortConfig(Section):
    """The peers and how they exchange embeddings."""

    extra_keys: ClassVar[Mapping[str, str]] = {
        "base": "Settings of every peer: any that an entry of `cohort.peers` may have. An entry of `cohort.peers` then "
        "states only what differs from them. Without `cohort.peers` there are two peers, which differ in their seeds. "
        "`ray-dmml config` prints the peers that result, each with all its settings."
    }

    peers: tuple[PeerConfig, ...] = (
        PeerConfig(name="peer0", seed=0, init_seed=0),
        PeerConfig(name="peer1", seed=1, init_seed=1),
    )
    """The peers, one entry each. If the file has `cohort.base`, an entry states only what differs from it."""

    transport: Literal["direct", "coordinator"] = "direct"
    """`direct`: peers send embeddings to each other, by torch.distributed. `coordinator`: the coordinator does."""

    max_teachers: Count | None = None
    """Maximum number of other peers that a peer learns from at each step, drawn by the seed and the step. It keeps the
    cost of a peer constant in large cohorts. null: a peer learns from all others."""

    placement_strategy: Literal["pack", "spread"] = "pack"
    """`pack` uses as few nodes as possible, so that embeddings travel short ways. `spread` uses as many as possible, so
    that few peers are lost with a node."""

    placement_timeout_s: Positive = 1800.0
    """Maximum time, in seconds, to wait until the cluster has room for the peers."""

    start_timeout_s: Positive = 300.0
    """Maximum time, in seconds, to wait for the peers to start, and again for their first step."""

    threads_per_peer: Count | None = None
    """Number of torch threads of a peer. On a CPU, results depend on it in their last bits. null: it is the number of
    the peer's CPUs, on a CPU without those of its `num_workers`, at least 1."""

    @property
    def learners(self) -> tuple[str, ...]:
        """Names of the peers that are not frozen."""
        return tuple(str(peer.name) for peer in self.peers if not peer.frozen)

    @property
    def frozen_peers(self) -> tuple[str, ...]:
        """Names of the frozen peers."""
        return tuple(str(peer.name) for peer in self.peers if peer.frozen)

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, raw: Any) -> Any:
        """Merges `base` into each peer, and fills in names and seeds by position."""
        if not isinstance(raw, Mapping):
            return raw
        raw = dict(raw)
        base, peers = raw.pop("base", None), raw.get("peers")
        if base is not None and not isinstance(base, Mapping):
            raise ValueError("cohort.base must be a mapping of peer settings")
        if base is not None and peers is None:
            peers = [{}, {}]
        if isinstance(peers, (list, tuple)):
            raw["peers"] = [cls._expand_peer(peer, base or {}, n) for n, peer in enumerate(peers)]
        return raw

    @staticmethod
    def _expand_peer(peer: Any, base: Mapping[str, Any], position: int) -> Any:
        if isinstance(peer, PeerConfig):
            peer = peer.model_dump(exclude_unset=True)
        if peer is None:  # "- " in YAML: the base, unchanged
            peer = {}
        if not isinstance(peer, Mapping):
            return peer
        peer = _deep_merge(base, peer)
        for key, default in (("name", f"peer{position}"), ("seed", position)):
            if peer.get(key) is None:
                peer[key] = default
        if peer.get("init_seed") is None:
            peer["init_seed"] = peer["seed"]
        return peer

    @model_validator(mode="after")
    def _peers_differ(self) -> CohortConfig:
        names = [str(peer.name) for peer in self.peers]
        if taken := [name for name in ("ensemble", "teachers_ensemble") if name in names]:
            raise ValueError(f"no peer may be named {taken[0]}, which is the name of several peers together")
        if "manifest.json" in map(str.lower, names):
            raise ValueError("no peer may be named manifest.json, which is a file beside the peers in a checkpoint")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"peer names must be unique; used twice: {', '.join(twice)}")
        alike: dict[str, str] = {}
        for name, peer in zip(names, self.peers, strict=True):
            first = alike.setdefault(peer.model_dump_json(exclude={"name"}), name)
            if first != name and not peer.frozen:
                raise ValueError(
                    f"{first} and {name} have the same seed and settings and would remain the same network: "
                    "give one of them another seed"
                )
        if not self.peers:
            raise ValueError("peers is empty: a cohort has at least one peer")
        if all(peer.frozen for peer in self.peers):
            raise ValueError("every peer is frozen: at least one must learn")
        return self


class MinerConfig(Section):
    """Selects the pairs or triplets of a batch that the metric loss receives."""

    main_setting = "name"

    name: str
    """`DistanceWeightedNegativeMiner` (of this package), a class of pytorch_metric_learning.miners, `module:Class` or
    an entry point."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor."""


TRIPLET_DEFAULTS: dict[str, Any] = {
    "args": {"margin": 0.2},
    "miner": {"name": "DistanceWeightedNegativeMiner"},
    "reducer": "MeanReducer",
}


class MetricLossConfig(Section):
    """The metric loss of a peer, from pytorch-metric-learning or your own."""

    main_setting = "name"

    name: str = "TripletMarginLoss"
    """A class of pytorch_metric_learning.losses, `module:Class` or an entry point."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor. num_classes and embedding_size are filled in if the loss requires them. A distance,
    and a loss or miner inside of another loss, is written {name: ..., args: {...}}. The margin of TripletMarginLoss is
    0.2 unless it is given here."""

    miner: MinerConfig | None = None
    """The miner. null: there is none. TripletMarginLoss has distance-weighted negatives unless one is given here."""

    reducer: str | None = None
    """A class of pytorch_metric_learning.reducers, `module:Class` or an entry point. null: it is the loss's own.
    TripletMarginLoss has MeanReducer unless a reducer is given here."""

    @model_validator(mode="before")
    @classmethod
    def _triplet_defaults(cls, raw: Any) -> Any:
        """The defaults apply to the default loss only. Another loss has the defaults of its library."""
        if isinstance(raw, Mapping) and raw.get("name", "TripletMarginLoss") == "TripletMarginLoss":
            given = {k: v for k, v in raw.items() if k != "args" or v is not None}
            args = _deep_merge(TRIPLET_DEFAULTS["args"], given.pop("args", {}))
            return {**TRIPLET_DEFAULTS, **given, "args": args}
        return raw


class MutualSection(Section):
    """Who teaches in a mutual term, and how its weights change during the run."""

    teacher: Literal["each", "ensemble", "others"] = "each"
    """`each`: every other peer is a teacher, and the term is the mean over them. `ensemble`: there is one teacher, the
    embeddings of all others and of the peer itself, each at unit length, concatenated in peer order. Its cost grows
    little with the number of peers. `others`: the same without the peer itself, as in distillation."""

    warmup_steps: Whole = 0
    """Number of first steps over which the weights rise linearly from 0."""

    decay_until: Count | None = None
    """Step at which the weights have fallen to 0, linearly from the end of the warm-up. null: they do not fall."""

    @model_validator(mode="after")
    def _decays_after_the_warm_up(self) -> MutualSection:
        if self.decay_until is not None and self.decay_until <= self.warmup_steps:
            raise ValueError(f"decay_until {self.decay_until} must be above warmup_steps {self.warmup_steps}")
        return self

    def factor(self, step: int) -> float:
        """What the weights are multiplied by at a step; 0 is the first."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.decay_until is None:
            return 1.0
        return max(0.0, (self.decay_until - step) / (self.decay_until - self.warmup_steps))


class RelationalConfig(MutualSection):
    """Relational distillation: the distances and angles between the teacher's embeddings."""

    distance_weight: NonNegative = 1.0
    """w_d: weight of the distance term."""

    angle_weight: NonNegative = 2.0
    """w_a: weight of the angle term."""

    normalize: bool = False
    """Scale embeddings to unit length before they are compared, as retrieval does. false: the outputs of the heads are
    compared, so their lengths count too. The metric loss always receives unit length."""


class SimilarityConfig(MutualSection):
    """Similarity distillation: which images the teacher finds most similar to each image of the batch."""

    main_setting = "weight"

    weight: NonNegative = 0.0
    """Weight of the term `similarity`."""

    temperature: Annotated[Number, Field(ge=1e-3)] = 0.1
    """The cosine similarities are divided by this before the softmax. A lower one counts the nearest images more."""


class RelaxedContrastiveConfig(MutualSection):
    """Relaxed contrastive loss: images are pulled together as strongly as they are similar for the teacher."""

    main_setting = "weight"

    weight: NonNegative = 0.0
    """Weight of the term `relaxed_contrastive`."""

    sigma: Annotated[Number, Field(ge=1e-3)] = 1.0
    """Squared distance between unit-length teacher embeddings at which two images are positive by 37 % (1 / e)."""

    delta: Positive = 1.0
    """Margin: dissimilar images are pushed until they are this many mean distances apart."""


class MutualTermConfig(MutualSection):
    """A mutual term of your own."""

    name: str
    """The term, as `module:Class` or an entry point: it takes the student's embeddings (B, D) and a list of the
    teachers' (B, D_n), and returns a scalar."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the class, or further arguments of a function."""

    weight: NonNegative = 1.0
    """Weight of the term."""

    label: Annotated[str, Field(pattern=r"^\w+$")] | None = None
    """Name of the term in metrics.jsonl and on the console. null: it is that of the class or function."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_label(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and isinstance(raw.get("name"), str) and raw.get("label") is None:
            return {**raw, "label": re.sub(r"\W", "_", re.split(r"[:.]", raw["name"])[-1])}
        return raw


BUILT_IN_TERMS = ("distance", "angle", "similarity", "relaxed_contrastive")
"""Names of the mutual terms that are not a user's own."""


class LossConfig(Section):
    """A peer minimises its metric loss and a mutual loss, the weighted sum of the terms below."""

    main_setting = "metric.name"

    metric: MetricLossConfig = Field(default_factory=lambda: MetricLossConfig.model_validate({}))
    """The metric loss of every peer."""

    relational: RelationalConfig = RelationalConfig()
    """Relational distillation, the mutual loss of DM2."""

    similarity: SimilarityConfig = SimilarityConfig()
    """Similarity distillation. It is off by default."""

    relaxed_contrastive: RelaxedContrastiveConfig = RelaxedContrastiveConfig()
    """The relaxed contrastive loss. It is off by default."""

    mutual: tuple[MutualTermConfig, ...] = ()
    """Further mutual terms, of your own (docs/how-to/own-parts.md)."""

    @model_validator(mode="after")
    def _labels_differ(self) -> LossConfig:
        labels = ["loss", "metric", *BUILT_IN_TERMS, *(str(term.label) for term in self.mutual)]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"mutual terms need other labels than {', '.join(twice)}, which are used twice")
        return self

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the mutual terms that have a weight."""
        built_in = (
            self.relational.distance_weight,
            self.relational.angle_weight,
            self.similarity.weight,
            self.relaxed_contrastive.weight,
        )
        weights = dict(zip(BUILT_IN_TERMS, built_in, strict=True)) | {str(t.label): t.weight for t in self.mutual}
        return tuple(name for name, weight in weights.items() if weight)


class LoggerConfig(Section):
    """A service that shows the run, or a logger of your own."""

    main_setting = "name"

    name: str
    """`wandb`, `mlflow` or `trackio`, each of which needs the extra of this name; or a subclass of ray_dmml.Logger, as
    `module:Class` or an entry point."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor, such as `{project: photos}`. `config` and `folder` (of the run) are filled in if it
    requires them."""


class TrainConfig(Section):
    """Length and rhythm of the training loop."""

    main_setting = "steps"

    steps: Count = 1000
    """Number of batches that every peer is trained on."""

    init_from: FilePath | None = None
    """Folder of a run. Each peer starts from the weights of the peer with the same name there: the best ones if there
    are any, else the last. null: peers start as `weights` says."""

    log_every: Count = 10
    """Steps between two reports of progress. metrics.jsonl contains every step."""

    evaluate_every: Whole = 100
    """Steps between two evaluations on the validation classes. 0: only at the end."""

    monitor: Literal["ensemble", "mean_peer"] = "ensemble"
    """The best checkpoint has the highest validation Recall@1: that of the ensemble, or the mean of the peers that are
    not frozen."""

    early_stopping: Count | None = None
    """Number of evaluations without a better value of `monitor` after which the run ends as if it had reached `steps`.
    It needs validation classes and `evaluate_every`. Trials and final runs of a search do not use it. null: the run
    makes all its steps."""

    tensorboard: bool = True
    """Write TensorBoard events to RUN/tensorboard."""

    report: bool = True
    """Write RUN/report.html at the end of the run: a page with curves, results and pictures. `ray-dmml report` writes
    it later."""

    pictures: Whole = 8
    """Number of images in the pictures that TensorBoard and services get: training images under every peer's view once,
    and at each validation the worst queries. The final evaluation gives them a sample of the embeddings. 0: neither."""

    loggers: tuple[LoggerConfig, ...] = ()
    """Services (`wandb`, `mlflow`, `trackio`) and loggers of your own, beside metrics.jsonl and TensorBoard."""


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    every_steps: Whole = 100
    """Steps between two checkpoints, and so the most that the loss of a peer costs. 0: checkpoints are written before
    the first step and after the last only."""

    num_to_keep: Count = 2
    """Number of latest checkpoints to keep beside the best one. With 2, there is another if the latest is damaged."""

    final: Literal["state", "weights"] = "state"
    """What the checkpoints hold after the end of the run. `state`: everything, so more steps can be added later.
    `weights`: only the last and the best weights, a third of the size with Adam; the run can then be evaluated, used
    and started from, but neither resumed nor extended."""

    storage_path: Annotated[str, BeforeValidator(_not_empty)] | None = None
    """Folder or URI (`s3://bucket/folder`, `gs://`, a mount) to which each checkpoint and the other files of the run
    are copied. A run can be resumed from there, too. null: the run is in its own folder only."""


class FailureConfig(Section):
    """What happens if something fails."""

    on_peer_loss: Literal["restart", "drop", "fail"] = "restart"
    """If a peer dies or hangs, `restart` starts it again, and all peers return to the last checkpoint. `drop` does so
    until `max_failures`, and then continues without the peer until the run is resumed. `fail` ends the run."""

    max_failures: Whole = 5
    """Maximum number of restarts in a run, all peers together. After that the run ends with its last checkpoint intact,
    or continues without the peer (`drop`)."""

    node_timeout_s: Positive = 10.0
    """Time, in seconds, within which a lost node is noticed if the run starts Ray itself. A cluster has its own
    settings for this. A lost process is noticed at once."""

    heartbeat_timeout_s: Positive = 60.0
    """Time, in seconds, after which a peer that neither advances nor answers counts as stuck; ten median steps if they
    take longer. A stuck peer is named, killed, and treated as lost."""

    on_nonfinite: Literal["fail", "skip"] = "fail"
    """What happens if a loss, gradient or embedding is NaN or infinite. `fail` ends the run. `skip` omits this update
    of the peer, and the other peers do not receive its embeddings."""

    max_consecutive_nonfinite: Count = 10
    """`skip`: number of consecutive batches that a peer may omit before the run ends."""


class EvaluationConfig(Section):
    """How embeddings are evaluated."""

    recall_at: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """The values of K in Recall@K."""

    batch_size: Count = 128
    """Number of images that are embedded at a time."""

    weights: Literal["last", "best", "ema"] | None = None
    """The weights of the final evaluation. null: the best if there are validation classes, else the last."""

    split: Literal["test", "validation"] | None = None
    """Classes of the final evaluation. Searches use `validation`, because they must not use the test classes. null: the
    test classes; if there are none, the validation classes; if there are none either, the run is not evaluated."""

    untrained: bool = True
    """Also evaluate the untrained peers and their frozen backbones (the features before the head) on these classes, for
    comparison. A run warns if a peer with pretrained weights ends below its frozen backbone."""


class Config(Section):
    """A whole experiment."""

    seed: Seed = 0
    """Seed of the run. Together with the peers' own seeds it determines all random numbers."""

    code: tuple[FilePath, ...] = ()
    """Python files and packages (folders) of your own, which the config names parts of (`module:Class`). They are sent
    to every process of the run."""

    data: DataConfig = DataConfig()
    """Images, splits and batches."""

    cohort: CohortConfig = CohortConfig()
    """The peers."""

    loss: LossConfig = LossConfig()
    """What the peers minimise."""

    train: TrainConfig = TrainConfig()
    """How long they train."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How they are evaluated."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved during the run."""

    failure: FailureConfig = FailureConfig()
    """What happens if something fails."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Config:
        batch = self.data.classes_per_batch * self.data.images_per_class
        loss = dotted(self.loss.metric.model_dump(), "loss.metric.")
        for key in [key for key, name in loss.items() if key.endswith(".name") and name == "CrossBatchMemory"]:
            size = f"{key.removesuffix('name')}args.memory_size"
            if isinstance(memory := loss.get(size, 1024), int) and memory < batch:
                raise ValueError(
                    f"{size} is {memory}, and must hold at least a batch, which has {batch} images "
                    "(data.classes_per_batch x data.images_per_class)"
                )
        if self.evaluation.split == "test" and self.data.name == "imagefolder" and self.data.train_fraction == 1:
            raise ValueError("evaluation.split is test, but there are no test classes: data.train_fraction is 1")
        if self.evaluation.split == "validation" and not self.data.validation_fraction:
            raise ValueError("evaluation.split is validation, but there are none: data.validation_fraction is 0")
        if self.train.early_stopping is not None:
            if not self.data.validation_fraction:
                raise ValueError(
                    "train.early_stopping needs validation classes, but there are none: data.validation_fraction is 0"
                )
            if not self.train.evaluate_every:
                raise ValueError("train.early_stopping needs evaluations before the end: train.evaluate_every is 0")
        try:
            self.weights_to_evaluate()
        except UserError as error:
            raise ValueError(f"evaluation.weights: {error}") from None
        return self

    def weights_to_evaluate(self, requested: str | None = None) -> str:
        """``last``, ``best`` or ``ema``: the requested weights, else `evaluation.weights`, else its default. None of
        them is selected on the test classes.

        Raises:
            UserError: the run has no such weights.
        """
        allowed = ["last"]
        if self.data.validation_fraction:
            allowed.append("best")
        if any(peer.ema for peer in self.cohort.peers):
            allowed.append("ema")
        which = requested or self.evaluation.weights or ("best" if "best" in allowed else "last")
        if which not in allowed:
            raise UserError(
                f"there are no weights {which!r}; there are {' and '.join(allowed)} (best needs "
                "data.validation_fraction above 0, ema a peer with the setting ema)"
            )
        return which

    @classmethod
    def load(cls, path: Path | str | None = None, overrides: Overrides = ()) -> Config:
        """Reads a YAML file (None: no file, only the defaults, as `Config()`) and applies overrides.

        Args:
            path: the file. Relative paths in it are relative to its folder.
            overrides: as in :meth:`with_overrides`.

        Raises:
            UserError: the file is missing or not valid YAML, or settings are unknown or out of range. The message lists
                all of them.
        """
        changes = " with overrides" if overrides else ""
        if path is None:
            return cls.parse(override_settings({}, overrides), source=f"the defaults{changes}")
        name = "the quickstart" if path == QUICKSTART else path
        return cls.parse(read_settings(Path(path), overrides), source=f"{name}{changes}")

    @classmethod
    def quickstart(cls, overrides: Overrides = ()) -> Config:
        """The built-in experiment that `ray-dmml train` runs without a config: two small peers, built-in images."""
        return cls.load(QUICKSTART, overrides)

    def with_overrides(self, overrides: Overrides) -> Config:
        """A changed copy; a config itself never changes. Every peer states all its settings, so a change for all
        peers is one override for each.

        Args:
            overrides: `{"train.steps": 500}` or `["train.steps=500"]`, with dotted keys. Relative paths are relative
                to the current folder.

        Raises:
            UserError: a setting is unknown or out of range.
        """
        raw = self.model_dump(mode="json")
        for peer in raw["cohort"]["peers"]:  # the default follows `seed`
            if peer["init_seed"] == peer["seed"]:
                del peer["init_seed"]
        metric = raw["loss"]["metric"]
        if metric["name"] == "TripletMarginLoss":  # another loss has not its defaults
            defaults = MetricLossConfig.model_validate({}).model_dump(mode="json")
            raw["loss"]["metric"] = {key: value for key, value in metric.items() if value != defaults[key]}
        return Config.parse(override_settings(raw, overrides), source="the config with overrides")

    @classmethod
    def parse(cls, raw: Mapping[str, Any], source: str = "config") -> Config:
        """Validates nested settings. ``source`` names them in errors.

        Raises:
            UserError: the message lists every wrong setting, its value, and what is allowed.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise UserError(explain(error, source, cls, raw)) from None

    def to_yaml(self) -> str:
        """The effective config with every field. `Config.load` reads the same config from it."""
        return yamlio.dump(self.model_dump(mode="json"))
