"""``icarus bench agents``: workflows of agents on several models, ICaRus and its peers beside each other over HTTP.

settings              what a run depends on, for flags and YAML; ``profiles`` to start from
workloads             workflows as graphs of calls; ``trajectories`` reads recorded ones
plan                  which runs, in which order, with which KV budgets
systems, server       how each system is started; a server in a process group of its own
load, metrics         workflows against a server; what its ``/metrics`` says meanwhile
sweep, records        all runs that are not in the file of records yet
figures, report       what a run comes to; medians, and what ICaRus gains over each peer
tables, plots         the report to read
command               the command line
"""
