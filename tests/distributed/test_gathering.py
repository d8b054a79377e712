from pathlib import Path

from tests.processes import Forks


def test_rows_of_all_processes_come_to_the_first_and_its_errors_to_all(forks: Forks) -> None:
    forks.run(str(Path(__file__).with_name("gathering.py")), ranks=3).ok()
