"""A run folder on the driver's host, the service that is its home, and ranks that go to it, for tests."""

from collections.abc import Callable
from pathlib import Path

from tests.label_nodes import TOKEN
from titan.checkpoint.fence import take_over
from titan.distill.service.home import Home
from titan.distill.service.protocol import location
from titan.distill.service.server import LabelService, serve
from titan.distill.storage import CORPUS

ROLE = "early"


class Run:
    """A run folder, the service that is its home, and ranks that go to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "labels").mkdir(parents=True)
        self.corpus = folder.parent / "corpus"
        self.closing: list[Callable[[], None]] = []
        self.service = self.serve()

    def serve(self, port: int = 0) -> LabelService:
        folders = {"run": self.folder, CORPUS: self.corpus}
        self.service = serve(self.folder / "labels", TOKEN, port=port, home=folders)
        self.closing.append(self.service.close)
        return self.service

    @property
    def where(self) -> str:
        return location("127.0.0.1", self.service.port)

    def home(self, role: str = ROLE, token: str = TOKEN, timeout_s: float = 20.0, where: str = "") -> Home:
        """Of a new generation of a role."""
        made = Home(where or self.where, token, role, take_over(self.folder, role), timeout_s, self.folder)
        self.closing.append(made.close)
        return made

    def close(self) -> None:
        for call in reversed(self.closing):
            call()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
