"""Before wheel and sdist are built: gives the README's links and pictures, and the project, the repository's address.

    python .github/repository_address.py https://github.com/OWNER/NAME v0.1.0

PyPI shows the README without the files that it links. The address is an argument, so that a fork links its own files.
"""

import re
import sys
import tomllib
from pathlib import Path

LINK = re.compile(r"(?P<before>\]\(|(?:src|srcset)=\")(?P<target>(?![a-z]+:|#)[^)\"\s]+)")
FENCED = re.compile(r"(^```.*?^```$)", re.S | re.M)


def absolute_links(readme: str, repository: str, ref: str) -> str:
    """Makes the relative links of a text point to the repository at a branch or tag. Code does not change."""

    def absolute(link: re.Match[str]) -> str:
        is_picture = re.search(r"\.(svg|png|jpe?g)$", link["target"])
        return f"{link['before']}{repository}/{'raw' if is_picture else 'blob'}/{ref}/{link['target']}"

    parts = FENCED.split(readme)
    return "".join(part if FENCED.fullmatch(part) else LINK.sub(absolute, part) for part in parts)


def project_urls(repository: str, ref: str) -> str:
    pages = {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{ref}/docs",
        "Changelog": f"{repository}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    return "\n[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in pages.items())


def main(root: Path, repository: str, ref: str) -> None:
    readme, project = root / "README.md", root / "pyproject.toml"
    version = tomllib.loads(project.read_text())["project"]["version"]
    if re.match(r"v\d", ref) and ref != f"v{version}":
        sys.exit(f"error: the tag is {ref}, and pyproject.toml says version {version}")
    readme.write_text(absolute_links(readme.read_text(), repository, ref))
    project.write_text(project.read_text() + project_urls(repository, ref))


if __name__ == "__main__":
    main(Path(__file__).parents[1], *sys.argv[1:])
