"""Real servers on this machine, without containers: SeaweedFS (S3), PostgreSQL or SQLite, MLflow, and a Ray cluster.

python -m infra.local_stack up        # start the servers that do not run yet, show health; also `make stack`
. runs/stack/environment.sh           # set the addresses and credentials of all of them
python -m infra.local_stack down      # stop them; --wipe deletes the data too
"""
