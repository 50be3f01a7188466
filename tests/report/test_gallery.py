"""What the sections with pictures show, against naive loops."""

from __future__ import annotations

from datetime import datetime
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from report_samples import Page, evaluation_of, judged_of, random_evaluation

from ray_dmml import Config
from ray_dmml.evaluation.evaluation import Evaluation
from ray_dmml.report.agreement import agreement_table
from ray_dmml.report.build import RunRecord, build_report
from ray_dmml.report.curves import read_metrics
from ray_dmml.report.data import Report
from ray_dmml.report.embedding_map import embedding_map, principal_components
from ray_dmml.report.gallery import MAX_OF_A_CLASS, confusions, disagreements, worst_classes, worst_queries
from ray_dmml.report.page import render
from ray_dmml.report.suspects import suspects


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return random_evaluation()


def ranking(evaluation: Evaluation, system: str, query: int) -> list[int]:
    """All other images, the most similar first, by a loop."""
    vectors = evaluation.embeddings[system].astype(np.float64)
    others = [n for n in range(len(vectors)) if n != query]
    return sorted(others, key=lambda n: -float(vectors[n] @ vectors[query]))


def first_rank(evaluation: Evaluation, system: str, query: int) -> int:
    labels = evaluation.images.labels
    order = ranking(evaluation, system, query)
    return next(rank for rank, n in enumerate(order, 1) if labels[n] == labels[query])


def test_worst_queries_come_first(evaluation: Evaluation) -> None:
    """Their first right image has the highest rank; of a class there are only a few."""
    group = worst_queries(judged_of(evaluation))
    ranks = [first_rank(evaluation, "ensemble", card.query.image) for card in group.cards]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] > 1
    num_right = evaluation.systems["ensemble"].values["map@r"]
    order = [(-rank, num_right[card.query.image]) for rank, card in zip(ranks, group.cards, strict=True)]
    assert order == sorted(order) and len(set(ranks)) < len(ranks)
    everyone = {query: first_rank(evaluation, "ensemble", query) for query in range(len(evaluation.images))}
    assert ranks[0] == max(everyone.values())
    names = [card.query.class_name for card in group.cards]
    assert max(names.count(name) for name in names) <= MAX_OF_A_CLASS
    assert f"{sum(rank > 1 for rank in everyone.values())} of {len(everyone)} queries" in group.note


def test_a_card_shows_what_every_system_finds(evaluation: Evaluation) -> None:
    card = worst_queries(judged_of(evaluation)).cards[0]
    assert [found.system for found in card.found] == ["peer0", "peer1", "ensemble"]
    for found in card.found:
        assert [tile.image for tile in found.tiles] == ranking(evaluation, found.system, card.query.image)[:8]
        labels = evaluation.images.labels
        right = [bool(labels[tile.image] == labels[card.query.image]) for tile in found.tiles]
        assert [tile.is_right for tile in found.tiles] == right
        rank = first_rank(evaluation, found.system, card.query.image)
        assert found.outcome == ("found" if rank == 1 else f"first right image at rank {rank}")


def test_disagreements_are_all_counted(evaluation: Evaluation) -> None:
    """The queries that one peer finds and the other does not."""
    one, other = disagreements(judged_of(evaluation), ["peer0", "peer1"])
    found = {
        name: {q for q in range(len(evaluation.images)) if first_rank(evaluation, name, q) == 1}
        for name in ("peer0", "peer1")
    }
    for group, only in ((one, found["peer0"] - found["peer1"]), (other, found["peer1"] - found["peer0"])):
        assert {card.query.image for card in group.cards} <= only
        assert group.note.startswith(f"{len(only)} of {len(evaluation.images)} queries")
        missed_by = "peer1" if group is one else "peer0"
        ranks = [first_rank(evaluation, missed_by, card.query.image) for card in group.cards]
        assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) > 1
    assert one.title == "peer0 finds, peer1 does not"


def test_the_agreement_is_that_of_a_loop(evaluation: Evaluation) -> None:
    table = agreement_table(judged_of(evaluation), ["peer0", "peer1"])
    assert table is not None
    num = len(evaluation.images)
    both = overlap = 0.0
    for query in range(num):
        both += all(first_rank(evaluation, name, query) == 1 for name in ("peer0", "peer1"))
        nearest = [set(ranking(evaluation, name, query)[:10]) for name in ("peer0", "peer1")]
        overlap += len(nearest[0] & nearest[1]) / 10
    [row] = table.rows
    assert row.cells[0].text == f"{100 * both / num:.1f} %" and row.cells[-1].text == f"{100 * overlap / num:.1f} %"
    found = [np.array([first_rank(evaluation, name, q) == 1 for q in range(num)]) for name in ("peer0", "peer1")]
    alone = [(found[0] & ~found[1]).sum(), (found[1] & ~found[0]).sum()]
    assert alone[0] != alone[1] and [cell.note for cell in row.cells[1:3]] == [str(n) for n in alone]


def test_classes_and_confusions() -> None:
    """Recall@1 of each class, the worst first, and how often two classes of any size are taken for each other."""
    rng = np.random.default_rng(0)
    of_images = np.repeat(np.arange(9), np.arange(3, 12))
    peers = [rng.normal(size=(9, 8))[of_images] + rng.normal(size=(len(of_images), 8)) for _ in range(2)]
    evaluation = evaluation_of(of_images.tolist(), *peers)
    labels, num = evaluation.images.labels, len(evaluation.images)
    nearest = [int(labels[ranking(evaluation, "ensemble", query)[0]]) for query in range(num)]
    classes = worst_classes(judged_of(evaluation))
    recalls = [row.recalls[-1] for row in classes.rows]
    assert recalls == sorted(recalls) and classes.systems[-1] == "ensemble"
    for row in classes.rows:
        queries = [q for q in range(num) if f"class {labels[q]}" == row.name]
        assert row.recalls[-1] == pytest.approx(np.mean([nearest[q] == labels[q] for q in queries]))
        assert row.num_queries == len(queries)
        wrong = [nearest[q] for q in queries if nearest[q] != labels[q]]
        most = max(wrong.count(label) for label in wrong)
        assert row.instead in {f"class {label} ({most})" for label in wrong if wrong.count(label) == most}
    counts = {
        pair: sum({int(labels[q]), nearest[q]} == set(pair) for q in range(num)) for pair in combinations(range(9), 2)
    }
    found = confusions(judged_of(evaluation))
    assert [sum(pair.counts) for pair in found] == sorted(counts.values(), reverse=True)[: len(found)]
    assert all(pair.counts[0] >= pair.counts[1] for pair in found)
    for pair in found:
        of, taken_for = (int(name.removeprefix("class ")) for name in pair.classes)
        for one, other, count, shown in zip(
            (of, taken_for), (taken_for, of), pair.counts, pair.num_queries, strict=True
        ):
            assert count == sum(labels[q] == one and nearest[q] == other for q in range(num))
            assert shown == (labels == one).sum()


@pytest.mark.parametrize("is_split", [False, True])
def test_mislabelled_images_are_found(is_split: bool) -> None:
    """Two images are labelled as another class: they are the first suspects, with the right suggestion. One of them may
    be a query and the other in the gallery."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(6), 10)
    labels = truth.copy()
    labels[[3, 44]] = 2, 0
    peers = [rng.normal(size=(6, 16))[truth] + 0.3 * rng.normal(size=(60, 16)) for _ in range(2)]
    parts = {"query": np.arange(1, 60, 2), "gallery": np.arange(0, 60, 2)} if is_split else {}
    evaluation = evaluation_of(labels.tolist(), *peers, **parts)
    number, num_clear, found = suspects(judged_of(evaluation), evaluation.embeddings)
    assert (number, num_clear) == (2, 2) and all(each.is_clear for each in found)
    assert {(each.query.image, each.suggested) for each in found} == {(3, "class 0"), (44, "class 4")}
    assert found[0].evidence.startswith("5 of its 5 nearest images are of this class, also by peer0 and peer1 alone. S")
    assert all(each.own is not None and each.own.is_right for each in found)
    margins = []
    for each in found:
        voters = [tile.similarity for tile in each.neighbors if tile.class_name == each.suggested]
        similarities = (
            f"Similarity to them {np.mean(voters):.2f}, to the nearest of its own class {each.own.similarity:.2f}"
        )
        assert each.evidence.endswith(similarities) and 4 * (1 - np.mean(voters)) <= 1 - each.own.similarity
        margins.append(np.mean(voters) - each.own.similarity)
    assert margins[0] > margins[1] > 0


def test_a_mislabelled_burst_is_found() -> None:
    """Its two images, both with the wrong label, do not vouch for each other: they exclude each other."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    peers = [rng.normal(size=(4, 16))[labels] + 0.3 * rng.normal(size=(40, 16)) for _ in range(2)]
    for peer in peers:
        peer[4] = peer[3] + 0.01
    labels[[3, 4]] = 2
    exclude = np.arange(40)
    exclude[4] = 3
    for changes, wanted in (({}, set()), ({"exclude": exclude}, {3, 4})):
        evaluation = evaluation_of(labels.tolist(), *peers, **changes)
        _, _, found = suspects(judged_of(evaluation), evaluation.embeddings)
        assert {each.query.image for each in found} == wanted


def test_no_suspects_among_small_classes() -> None:
    """Two images of a class cannot outvote another one."""
    rng = np.random.default_rng(0)
    evaluation = evaluation_of(np.repeat(np.arange(20), 2).tolist(), rng.normal(size=(40, 8)))
    assert len(evaluation.systems) == 1
    from dataclasses import replace

    retrievals = replace(judged_of(evaluation), main="peer0")
    assert suspects(retrievals, evaluation.embeddings) == (0, 0, [])


def test_an_image_between_two_classes_is_no_clear_case() -> None:
    """It is nearer to the other class, and not much farther from its own."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    centres = rng.normal(size=(4, 16))
    peers = [centres[labels] + 0.3 * rng.normal(size=(40, 16)) for _ in range(2)]
    for peer in peers:
        peer[3] = 0.4 * centres[0] + 0.6 * centres[1]
    evaluation = evaluation_of(labels.tolist(), *peers)
    number, num_clear, found = suspects(judged_of(evaluation), evaluation.embeddings)
    assert (number, num_clear) == (1, 0) and found[0].query.image == 3 and not found[0].is_clear


def test_query_and_gallery_are_apart() -> None:
    """Only queries are retrievals, and only the gallery is found."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(5), 6)
    query, gallery = np.arange(10), np.arange(10, 30)
    evaluation = evaluation_of(
        labels.tolist(), rng.normal(size=(30, 6)), rng.normal(size=(30, 6)), query=query, gallery=gallery
    )
    retrievals = judged_of(evaluation)
    for card in worst_queries(retrievals).cards:
        assert card.query.image < 10
        assert all(tile.image >= 10 for found in card.found for tile in found.tiles)
    drawn, on_map = embedding_map(retrievals, evaluation.embeddings["ensemble"], ["class 1"])
    assert len(on_map) == 30 and drawn.data["state"].count(2) == 20
    is_found = retrievals.is_found("ensemble")
    assert drawn.data["state"][:10] == is_found.astype(int).tolist() and drawn.missed.count("M") == (~is_found).sum()


def test_a_map_of_some_images_names_and_places_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more images than fit, each that is on the map has its own place, class and name."""
    monkeypatch.setattr("ray_dmml.report.embedding_map.MAX_DOTS", 20)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # principal components, also with UMAP
    labels = np.repeat(np.arange(2), 30)
    line = np.where(labels == 0, -1.0, 1.0)[:, None] * [[0.8, 0.6]] + np.linspace(0, 0.2, 60)[:, None]
    evaluation = evaluation_of(labels.tolist(), line, line)
    drawn, on_map = embedding_map(judged_of(evaluation), evaluation.embeddings["ensemble"], [])
    assert len(on_map) == len(set(on_map.tolist())) == 20 and "20 of 60 images" in drawn.note
    assert drawn.data["names"] == [f"square {image}" for image in on_map]
    assert [drawn.data["classes"][n] for n in drawn.data["label"]] == [f"class {labels[image]}" for image in on_map]
    x = np.array(drawn.data["x"])
    left, right = (x[labels[on_map] == label] for label in np.argsort([x[labels[on_map] == n].mean() for n in (0, 1)]))
    assert left.max() < right.min()


@pytest.mark.parametrize("case", ["small gallery", "all found", "one peer", "two images of a class"])
def test_a_page_of_little(case: str) -> None:
    """Few images, nothing that is wrong, or a single peer: the page has the sections that there is something for."""
    rng = np.random.default_rng(0)
    labels, noise, peers, changes = np.repeat(np.arange(3), 4), 3.0, 2, {}
    if case == "small gallery":  # fewer images than are kept
        changes = {"query": np.arange(0, 12, 2), "gallery": np.arange(1, 12, 3)}
    elif case == "all found":
        noise = 0.0
    elif case == "one peer":
        peers = 1
    else:
        labels = np.repeat(np.arange(2), 2)
    vectors = [rng.normal(size=(3, 8))[labels] + noise * rng.normal(size=(len(labels), 8)) for _ in range(peers)]
    evaluation = evaluation_of(labels.tolist(), *vectors, **changes)
    results = {
        **{"untrained": {}, "untrained_ensemble": {}, "frozen_backbones": {}, **evaluation.summary()},
        **{"weights": "last", "step": 3, "split": "test", "split_by": "class", "init_from": None},
        **{"num_classes": 3, "num_images": len(labels), "num_queries": None, "num_gallery": None},
    }
    config = Config.parse({"cohort": {"peers": [{}] * peers}})
    record = RunRecord(Path("run"), config, {}, read_metrics(Path("none")), results, evaluation)
    report = build_report([record], made=datetime(2026, 1, 1))
    page = Page()
    page.feed(render(report))
    assert {"results", "classes", "map"} <= set(page.ids)
    assert ("gallery" in page.ids) == bool(report.groups)
    assert ("agreement" in page.ids) == (peers > 1)
    if case == "all found":
        assert not report.groups and not report.confusions and report.classes is not None and not report.classes.rows
    if case == "one peer":
        assert "ensemble" not in page.texts and "Worst queries of peer0" in page.texts


def test_runs_side_by_side() -> None:
    """On equal images the page shows what one run finds and the other does not. Otherwise it says why there is none."""
    config, nothing = Config.parse({}), read_metrics(Path("none"))

    def report_of(*evaluations: Evaluation) -> tuple[Report, Page]:
        records = [RunRecord(Path(f"run{n}"), config, {}, nothing, None, each) for n, each in enumerate(evaluations)]
        report, page = build_report(records, made=datetime(2026, 1, 1)), Page()
        page.feed(render(report))
        return report, page

    report, page = report_of(random_evaluation(seed=0), random_evaluation(seed=1))
    assert {"run0 finds, run1 does not", "Runs disagree"} <= set(page.texts)
    assert "different images" not in page.text
    report, page = report_of(random_evaluation(), random_evaluation(num_classes=8))
    assert "The runs are evaluated on different images" in page.text and not report.groups


def test_principal_components_are_those_of_the_svd() -> None:
    """To their signs; the share is that of the variance."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 7)) * [5, 3, 1, 1, 1, 1, 1]
    places, share = principal_components(points)
    centered = points - points.mean(axis=0)
    left, singular, _ = np.linalg.svd(centered, full_matrices=False)
    expected = (left * singular)[:, :2]
    assert np.allclose(np.abs(places), np.abs(expected), atol=1e-8)
    assert share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum())
    equal, nothing = principal_components(np.ones((4, 3)))
    assert np.allclose(equal, 0) and nothing == 0
