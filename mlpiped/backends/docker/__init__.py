"""A Docker engine on the daemon's own host, whose containers see the job folder at its own path.

backend     the seam: create by the token's name -> claim -> start -> watch -> judge -> witness
making      the container of a job: made, or found from before a crash
jobs        the job folder, and what is only in a container's
engine      the only room that knows aiodocker
container   a job as the engine is told of it
mounts      what of the host it sees
script      what runs in it: a shell script around the step, the witness of its end
judging     how it ended
printing    what it prints, where there is no shell to put it into the folder
watching    hints that it may have
removing    containers that nobody needs any more
images      tags and Dockerfiles
built       what Dockerfiles made, and when it goes
dockerfile  the base images in one
"""

from mlpiped.backends.docker.backend import DockerBackend

__all__ = ["DockerBackend"]
