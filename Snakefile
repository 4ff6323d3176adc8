# Turns a profile of study.yaml into papermill runs and, when all are done, its tables (notebooks/tables.ipynb, which
# runs those of notebooks/tables/ in its own kernel and writes index.md last).
# Started by `make study` (python -m linl.study run PROFILE), which checks everything first.
#
# A run's only declared output is result.json: it is renamed into place as the last thing a run does, so a
# killed run leaves none, and its checkpoints stay for the next start. Notebooks are `ancient`: a corrected
# sentence doesn't redo days of training.
import sys

from linl import engine, study

PROFILE = config.get("profile", "quick")
MOST = engine.capacity(config)  # what a run may have at most; here, or by the cluster's profile
JOBS = {str(job.folder): job for job in study.jobs(PROFILE)}
TABLES = str(study.tables_folder(PROFILE))


def job_of(wildcards):
    return JOBS[wildcards.folder]


localrules:
    all,
    tables,


rule all:
    input:
        [f"{folder}/result.json" for folder in JOBS],
        f"{TABLES}/index.md",


rule run:
    input:
        notebook=lambda w: ancient(str(job_of(w).notebook)),
    output:
        "{folder}/result.json",
    wildcard_constraints:
        folder=".*/runs/(?!tables/).*",
    log:
        "{folder}/log.txt",
    threads: lambda w: MOST.threads(job_of(w).threads)
    resources:
        mem_mb=lambda w: MOST.megabytes(job_of(w).memory),
        runtime=lambda w: job_of(w).minutes,
        gpu=lambda w: MOST.gpus_of(job_of(w).gpus),
    params:
        values=lambda w, threads: study.as_yaml({**job_of(w).params, "threads": threads}),
        python=sys.executable,
        lent=lambda w: f"-m linl.lending {MOST.gpus_of(job_of(w).gpus)}" if MOST.gpus_of(job_of(w).gpus) else "",
    shell:
        "OMP_NUM_THREADS={threads} {params.python:q} {params.lent} -m papermill"
        " {input.notebook:q} {wildcards.folder:q}/notebook.ipynb"
        " --no-progress-bar --log-output --autosave-cell-every 30 -y {params.values:q} > {log:q} 2>&1"


rule tables:
    input:
        [f"{folder}/result.json" for folder in JOBS],
    output:
        f"{TABLES}/index.md",
    params:
        python=sys.executable,
        tables=TABLES,
        profile=PROFILE,
    shell:
        "{params.python:q} -m linl.study tables --source runs --profile {params.profile:q} --out {params.tables:q}"
