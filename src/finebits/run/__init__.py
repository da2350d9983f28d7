"""The parts of a job, each made by a process of its own: `python -m finebits.run FOLDER STAGE`, started by finebits.job.

Whatever holds a model runs so, under stated allocator settings, that its memory can be measured and nothing of one part is left in the next.
`stage` is what such a process is told and what its result depends on, `material` the rows that all of them share, `part` what each has at
hand; `start`, `tune`, `peer`, `probe` and `ship` are what they do. `plans` and `results` are what the job does itself before and after.
"""
