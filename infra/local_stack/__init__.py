"""Real servers on this machine, without containers: SeaweedFS (S3), PostgreSQL or SQLite, MLflow, and a Ray cluster.

python -m infra.local_stack up        # start what does not run yet, show health; `make stack`
. runs/stack/environment.sh           # address and credentials of all of them
python -m infra.local_stack down      # stop; --wipe forgets the data too
"""
