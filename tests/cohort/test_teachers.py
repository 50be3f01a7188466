"""Who learns from whom."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import unlike_peers
from hypothesis import given
from hypothesis import strategies as st

from ray_dmml.cohort.local import LocalCohort
from ray_dmml.cohort.teachers import Teachers, students
from ray_dmml.config.code import read_code, use_code
from ray_dmml.data.datasets import load_splits


@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 10**6), st.integers(0, 10**6))
def test_everyone_learns_from_k_others_and_teaches_k(num_peers: int, at_most: int, seed: int, step: int) -> None:
    """k different others each, ascending, and never oneself; as many learn from everybody."""
    found = Teachers(num_peers, at_most, seed).at(step)
    expected = min(at_most, num_peers - 1)
    for peer, teachers in enumerate(found):
        assert len(teachers) == len(set(teachers)) == expected
        assert list(teachers) == sorted(teachers) and peer not in teachers
        assert all(0 <= teacher < num_peers for teacher in teachers)
    learners = [students(found, peer) for peer in range(num_peers)]
    assert [len(each) for each in learners] == [expected] * num_peers
    for peer, each in enumerate(learners):
        assert each == [other for other, teachers in enumerate(found) if peer in teachers]
    assert Teachers(num_peers, at_most, seed).at(step) == found


def test_everybody_is_everybodys_teacher_in_time() -> None:
    """Over many steps each pair meets as often as any other; another seed draws otherwise."""
    draw = Teachers(6, 2, seed=3)
    meetings = np.zeros((6, 6))
    for step in range(3000):
        for peer, teachers in enumerate(draw.at(step)):
            meetings[peer, list(teachers)] += 1
    off_diagonal = meetings[~np.eye(6, dtype=bool)]
    assert np.allclose(off_diagonal, 3000 * 2 / 5, rtol=0.1)
    other = Teachers(6, 2, seed=4)
    assert any(other.at(step) != draw.at(step) for step in range(5))


def test_without_a_limit_everybody_learns_from_all_others() -> None:
    """In peer order; a limit that is no limit is the same."""
    assert Teachers(3).at(7) == [(1, 2), (0, 2), (0, 1)]
    assert Teachers(3, max_teachers=2).at(7) == Teachers(3).at(7)
    assert Teachers(3).all_others and Teachers(3, 5).all_others and not Teachers(3, 1).all_others
    assert Teachers(1).at(0) == [()]


@pytest.mark.parametrize("max_teachers", [None, 1, 3])
def test_the_place_of_a_peer_among_its_teachers(max_teachers: int | None) -> None:
    """Inserted there, the peer and its teachers are in peer order."""
    teachers = Teachers(5, max_teachers, seed=3)
    for step in range(10):
        for peer, taught_by in enumerate(teachers.at(step)):
            everyone = list(taught_by)
            everyone.insert(teachers.place(step, peer), peer)
            assert everyone == sorted(everyone)


FIRST_MOMENT = """
import torch

def first_moment(student, teachers):
    (teacher,) = teachers
    return (teacher @ torch.arange(1.0, 1 + teacher.shape[1])).square().mean()
"""


def test_all_peers_have_one_ensemble(image_folder: Path, tmp_path: Path) -> None:
    """What each peer publishes, in peer order, also that of a peer that teaches with averaged weights: a term that
    depends on nothing but the ensemble has one value for all."""
    (tmp_path / "own_term.py").write_text(FIRST_MOMENT)
    use_code(read_code([tmp_path / "own_term.py"]))
    term = {"name": "own_term:first_moment", "teacher": "ensemble"}
    config = unlike_peers(image_folder, loss={"mutual": [term]})
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        rows = cohort.run(0, 4, lambda finished: None)
    use_code({})
    for row in rows:  # a peer without terms only publishes at this step
        assert len({terms["first_moment"] for terms in row.values() if terms}) == 1
