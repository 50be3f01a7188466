"""The model card of a pushed cohort: its README.md, made of the config and the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm

from ray_dmml.config import yamlio
from ray_dmml.config.parts import is_own
from ray_dmml.config.schema import Config, MetricLossConfig, PeerConfig
from ray_dmml.hub.published_config import NOT_PUBLISHED
from ray_dmml.inference import TrainedCohort, TrainedPeer
from ray_dmml.loggers.figures import describe_images, describe_unevaluated, heading, main_metrics, rows_of
from ray_dmml.models.backbone import HUB, timm_args

TAGS = ("ray-dmml", "timm", "image-retrieval", "metric-learning", "mutual-learning")


def model_card(
    repo: str,
    config: Config,
    cohort: TrainedCohort,
    results: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    license: str | None,
    dataset: str | None,
) -> str:
    """The text of README.md.

    Args:
        repo: ``OWNER/NAME``.
        config: the published one.
        cohort: the nets.
        results: content of results.json.
        facts: content of pushed.json.
        license: identifier of the weights' licence.
        dataset: name of the images for a reader.
    """
    header: dict[str, Any] = {} if license is None else {"license": license.lower()}
    header |= {"library_name": "ray-dmml", "pipeline_tag": "image-feature-extraction", "tags": list(TAGS)}
    if bases := base_models(config):
        header["base_model"] = bases
    parts = [
        f"---\n{yamlio.dump(header)}---\n",
        f"# {repo.partition('/')[2]}\n",
        *_introduction(config, cohort, facts),
        *_use(repo, config, cohort),
        *_results(results),
        *_training(config, results, facts, dataset),
        *_limits(config, results, facts),
        f"## Licence\n\n{license or 'Not stated.'}\n",
    ]
    return "\n".join(parts)


def base_models(config: Config) -> list[str]:
    """Repositories of the hub with the pretrained weights that the peers began with, as far as they are known."""
    if config.train.init_from is not None:  # of a run, whose own start is not known here
        return []
    found = []
    for peer in config.cohort.peers:
        if peer.weights == "pretrained":
            is_on_hub = peer.backbone.startswith(HUB)
            found.append(peer.backbone.removeprefix(HUB) if is_on_hub else _pretrained(peer).hf_hub_id)
    return [name for name in dict.fromkeys(found) if name]


def changed_settings(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, as a config file states them."""
    raw, default = config.model_dump(mode="json"), Config().model_dump(mode="json")
    raw["evaluation"]["weights"] = None  # the published config always states them
    name = config.loss.metric.name
    default["loss"]["metric"] = MetricLossConfig.model_validate({"name": name}).model_dump(mode="json")
    peers = []
    for number, peer in enumerate(raw["cohort"].pop("peers")):
        usual = PeerConfig(name=f"peer{number}", seed=number, init_seed=peer["seed"]).model_dump(mode="json")
        peers.append(_difference(peer, usual))
    changed = _difference(raw, default)
    if name != Config().loss.metric.name:
        loss = changed.setdefault("loss", {})
        loss["metric"] = {"name": name, **loss.get("metric", {})}
    changed["cohort"] = {**changed.get("cohort", {}), "peers": peers}
    return changed


def _difference(value: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, own in value.items():
        usual = default[key]
        if own in (usual, NOT_PUBLISHED):
            continue
        if isinstance(own, dict) and isinstance(usual, dict) and not key.endswith("args"):
            found[key] = _difference(own, usual)
        else:
            found[key] = own
    return found


def _introduction(config: Config, cohort: TrainedCohort, facts: Mapping[str, Any]) -> Iterator[str]:
    number = len(cohort.peers)
    if number == 1:
        yield (
            "This network embeds images for retrieval: an image becomes a vector of unit length, and images of the "
            "same class have similar vectors. It was trained with ray-dmml. "
            f"An embedding has {cohort.size} dimensions.\n"
        )
    else:
        training = "The peers were trained together, by diversified mutual learning with ray-dmml."
        if config.cohort.frozen_peers:
            teachers = ", ".join(config.cohort.frozen_peers)
            training = f"They come from one training run of ray-dmml, in which the weights of {teachers} were frozen."
        yield (
            f"These {number} networks (*peers*) embed images for retrieval: an image becomes a vector of unit length, "
            f"and images of the same class have similar vectors. {training} The ensemble's embedding is the peers' "
            "embeddings, concatenated and divided by the square root of their number. It has "
            f"{cohort.size} dimensions.\n"
        )
    rows = []
    for peer in config.cohort.peers:
        trained = cohort.peers[str(peer.name)]
        figures = trained.preprocessing
        start = {NOT_PUBLISHED: "a file", "none": "random"}.get(peer.weights, peer.weights)
        view = peer.view if isinstance(peer.view, str) else ", ".join(part.name for part in peer.view)
        rows.append((peer.name, f"`{peer.backbone}`", start, trained.size, f"{figures['input_size']} px", view))
    if config.train.init_from is not None:
        rows = [(*row[:2], "another run", *row[3:]) for row in rows]
    yield _table(("peer", "backbone", "initial weights", "dimensions", "input", "training view"), rows)
    what = "ensemble" if number > 1 else "network"
    yield f"The fingerprint of the {what} is `{facts['fingerprint']}`.\n"


def _use(repo: str, config: Config, cohort: TrainedCohort) -> Iterator[str]:
    trust = ", trust_code=True" if any(is_own(peer.backbone) for peer in config.cohort.peers) else ""
    yield (
        "## Use\n\n```python\nfrom ray_dmml import load_cohort\n\n"
        f'cohort = load_cohort("{HUB}{repo}"{trust})\n'
        f'embeddings = cohort.embed_files(["a.jpg", "b.jpg"])  # numpy, float32 (2, {cohort.size})\n```\n'
    )
    plain = [peer for peer in config.cohort.peers if not is_own(peer.backbone) and peer.pooling == "native"]
    if plain:
        name = str(plain[0].name)
        others = " The other peers load in the same way, with their own values." if len(plain) > 1 else ""
        yield f"This loads the peer {name} alone, without ray-dmml.{others}\n"
        yield _with_timm(repo, config, plain[0], cohort.peers[name])


def _with_timm(repo: str, config: Config, peer: PeerConfig, trained: TrainedPeer) -> str:
    figures, size = trained.preprocessing, config.data.decode_size
    given = "".join(f", {key}={value}" for key, value in timm_args(peer.backbone, peer.input_size).items())
    has_head = trained.net.head_size > 0
    prefix = '"backbone."'
    resize = f"v2.Resize([{size}, {size}])"
    if config.data.resize == "center_crop":
        resize = f"v2.Resize({size}), v2.CenterCrop({size})"
    resized = round(figures["input_size"] / figures["crop"])
    output = 'features @ weights["head.weight"].T + weights["head.bias"]' if has_head else "features"
    return f"""```python
import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torchvision.io import decode_image
from torchvision.transforms import v2

weights = load_file(hf_hub_download("{repo}", "{peer.name}/weights.safetensors"))
backbone = timm.create_model("{peer.backbone}", num_classes=0{given}).eval()
backbone.load_state_dict({{k.removeprefix({prefix}): v for k, v in weights.items() if k.startswith({prefix})}})
view = v2.Compose([
    {resize},
    v2.Resize([{resized}, {resized}]), v2.CenterCrop({figures["input_size"]}),
    v2.ToDtype(torch.float32, scale=True), v2.Normalize({figures["mean"]}, {figures["std"]}),
])
images = torch.stack([view(decode_image(path, mode="RGB")) for path in ["a.jpg", "b.jpg"]])
with torch.no_grad():
    features = backbone(images)
    embeddings = torch.nn.functional.normalize({output})  # (2, {trained.size})
```
"""


def _results(results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Results\n"
    if results["split"] is None:
        yield f"The model was {describe_unevaluated(results)}.\n"
        return
    yield f"{describe_images(results)}. Weights: {results['weights']} (step {results['step']}). In percent.\n"
    metrics = main_metrics(results)
    first = next(metric for metric in metrics if metric.startswith("recall@"))
    rows = []
    for name, figures, intervals in rows_of(results):
        cells = [f"{100 * figures[metric]:.1f}" if metric in figures else "-" for metric in metrics]
        ends = [f"{100 * end:.1f}" for end in intervals.get(first, ())]
        rows.append((name, *cells, " to ".join(ends) or "-"))
    yield _table(("", *map(heading, metrics), f"{heading(first)}, 95 % interval"), rows)
    yield (
        "R@K is the share of queries with an image of their class among the K nearest. The interval is by bootstrap "
        "over the classes. It does not cover other seeds.\n"
    )


def _training(
    config: Config, results: Mapping[str, Any], facts: Mapping[str, Any], dataset: str | None
) -> Iterator[str]:
    yield "## Training\n"
    source = f"`{config.data.name}`"
    yield f"Images: {f'{dataset} ({source})' if dataset else source}, split by {config.data.split_by}.\n"
    if facts["images"]:
        rows = [
            (split, f"{of['num_images']:,}", f"{of['num_classes']:,}", f"`{of['sha256']}`")
            for split, of in facts["images"].items()
        ]
        yield _table(("split", "images", "classes", "SHA-256"), rows)
        yield (
            "Splits with equal SHA-256 have the same images in the same order: names and sizes of the files, classes, "
            "queries and gallery.\n"
        )
    yield f"Settings that differ from the defaults:\n\n```yaml\n{yamlio.dump(changed_settings(config))}```\n"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield f"The file `config.yaml` has all settings. Versions: {versions or 'not known'}.\n"


def _limits(config: Config, results: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        f"The figures are those of one training run (seed {config.seed}), on images of one data set. Evaluate the "
        "model on your own images before you rely on it.",
        "Embeddings of one model cannot be compared with those of another, nor those of a peer with the ensemble's.",
    ]
    if results["split"] is not None and results["split_by"] == "image":
        lines.append("The evaluated classes were trained on. Figures on other classes will be lower.")
    elif results["split"] == "validation":
        lines.append("The validation classes may have selected the weights, so their figures are somewhat too high.")
    if missing := sorted(set(facts["peers"]) - set(results["peers"])) if results["split"] else []:
        lines.append(
            f"The ensemble's figures are without peers that were dropped during training: {', '.join(missing)}."
        )
    if base_models(config):
        lines.append("The pretrained weights that the training began with have a licence of their own.")
    own = [f"{peer.name} ({peer.backbone})" for peer in config.cohort.peers if is_own(peer.backbone)]
    if own:
        code = "in the folder `code`" if config.code else "of a package that is not in this repository"
        lines.append(
            f"{', '.join(own)}: the backbone is Python code {code}. It runs with `trust_code=True`. Read it "
            "first, and pin the commit (`revision`)."
        )
    yield "## Limits\n"
    yield "".join(f"- {line}\n" for line in lines)


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:], ""])


def _pretrained(peer: PeerConfig) -> Any:
    return timm.get_pretrained_cfg(peer.backbone)
