"""Checks of versions, extras and faiss, of requirements that the test makes."""

from __future__ import annotations

from packaging.requirements import Requirement

from ray_dmml.doctor import libraries

NEEDED = [
    Requirement(line)
    for line in (
        "torch>=2.6",
        "faiss-cpu>=1.11",
        'winonly; sys_platform == "win32"',
        'onnx>=1.18; extra == "export"',
        'onnxscript; extra == "export"',
        'peft>=0.15; extra == "lora"',
        'pytest; extra == "test"',
    )
]
INSTALLED = {"torch": "2.7.0+cu126", "faiss-cpu": "1.11.0", "onnx": "1.19.0", "onnxscript": "0.5.1"}


def test_what_is_missing_or_too_old() -> None:
    """A build's suffix, such as +cu126, is none of the version. Requirements of other systems and of extras are left
    out."""
    assert libraries.unmet(NEEDED, INSTALLED) == []
    assert libraries.unmet(NEEDED, {**INSTALLED, "torch": "2.5.1+cpu"}) == ["torch>=2.6 (installed: 2.5.1+cpu)"]
    assert libraries.unmet(NEEDED, {"torch": "2.8.0.dev20250501"}) == ["faiss-cpu>=1.11 (not installed)"]
    assert libraries.unmet([Requirement("torch==2.7.0")], {"torch": "2.7.0+cu126"}) == []


def test_versions_that_do_not_go_together_are_a_problem() -> None:
    """As a torchvision of another torch, which fails at its import."""
    faults = libraries.unmet([Requirement("torch==2.6.0")], INSTALLED)
    assert libraries.versions("3.11.9", INSTALLED, {"ray-dmml": [], "torchvision": []}).state == "ok"
    check = libraries.versions("3.11.9", INSTALLED, {"ray-dmml": [], "torchvision": faults})
    assert check.state == "problem"
    assert check.message.startswith("python 3.11.9, torch 2.7.0+cu126, faiss-cpu 1.11.0; ")
    assert check.message.endswith("torchvision needs torch==2.6.0 (installed: 2.7.0+cu126)")


def test_extras() -> None:
    """An extra is there if all of its packages are. Those of developers are not listed."""
    assert libraries.extras_of(NEEDED) == ["export", "lora"]
    assert libraries.unmet(NEEDED, INSTALLED, "export") == []
    assert libraries.unmet(NEEDED, INSTALLED, "lora") == ["peft>=0.15 (not installed)"]
    check = libraries.extras(["export"], ["lora"])
    assert check.message == "installed: export; not: lora (pip install 'ray-dmml[NAME]')"


def test_the_package_states_what_it_needs() -> None:
    """The metadata of the installed package is read; a package that is not installed needs nothing."""
    names = {requirement.name for requirement in libraries.requirements_of("ray-dmml")}
    assert {"torch", "ray", "timm"} <= names
    assert libraries.requirements_of("no-such-package") == []
    assert set(libraries.installed_versions(["torch", "no-such-package"])) == {"torch"}


def test_faiss_without_vector_instructions_is_a_note() -> None:
    assert libraries.faiss("AVX2", {"avx2", "avx512f"}).state == "ok"
    assert libraries.faiss("NONE", {"sse4_2"}).state == "ok"  # the CPU has no others
    slow = libraries.faiss("GENERIC", {"avx2"})
    assert slow.state == "note" and slow.advice is not None and "faiss-cpu" in slow.advice
    assert libraries.faiss_level().isupper() or "_" in libraries.faiss_level()


def test_a_library_that_cannot_be_imported_is_a_problem() -> None:
    check = libraries.broken("torch", ImportError("libcudart.so.12: cannot open shared object file\nmore"))
    assert check.state == "problem"
    assert check.message == "cannot be imported: libcudart.so.12: cannot open shared object file"
