"""How good a specialist on a shared cache is, beside conventional LoRA: equal data, order, steps and tokens.

* ``data``: the tasks, from the files of public data sets
* ``settings``: what is compared, read from YAML
* ``plan``: which run comes next; the search for each arm's learning rate
* ``driver``: run after run
* ``work``: one run: training, its curve, its scores
* ``times``: step times of two arms, alternating
* ``report``: tables and plots
* ``gemma``: the second base model, from its packages

``python -m experiments.accuracy run experiments/accuracy/smollm2.yaml --data DATA --work WORK``
"""
