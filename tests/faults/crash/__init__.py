"""The crash harness: a daemon that is killed at random moments and named points, and a judge that does not trust it.

scenario    the pipelines, and what they have to have done
trial       the loop: arm, start, ask for work, let die, start again, until all is done
judge       the verdict, from what the steps themselves wrote down
elsewhere   … with steps on a machine that dies too
cluster     … that is a Slurm cluster
power       a disk whose power can be cut
mutants     daemons with one promise broken: the harness must notice each
impatient   a daemon for a cluster whose nodes see the same files at once
soak        the loop for as long as one likes (`make soak`)
"""
