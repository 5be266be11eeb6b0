"""Continuous batching on eight forced CPU devices, in a process of its own: `python -m tests.generate.paged_mesh FILE`.

FILE holds the ids that one device gives to `meshes.asked()`.
"""

import json
import sys

from llava_jax.generate import batching
from llava_jax.generate.pages import prompt_of
from llava_jax.generate.scheduler import Job, of_assistant
from llava_jax.prompt.encode import encode
from tests.generate import meshes
from tests.generate.test_scheduler import answers, random_arrivals


def main(path: str) -> None:
    """Prints how many answers were compared; fails where one differs."""
    expected = json.loads(open(path, encoding="utf-8").read())["greedy"]
    mesh = batching.one_copy()
    assert mesh is not None and mesh.size == 8
    one = meshes.assistant(mesh)
    stops = one.format.template.stops
    jobs = [Job(prompt_of(encode(talk, one.format, reply=True)), meshes.NEW, stops=stops) for talk in meshes.asked()]
    make = of_assistant(one, 8, 512)
    found = answers(jobs, make())
    assert [[each.id for each in made] for _, made, _ in found] == expected
    assert random_arrivals(jobs, make(), 0) == found
    assert [answers([each], make())[0] for each in jobs[:6]] == found[:6]
    print(len(found))


if __name__ == "__main__":
    main(sys.argv[1])
