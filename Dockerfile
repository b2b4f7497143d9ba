# The image for k8s/rayjob.yaml and for cluster.yaml's `docker:`: Ray's own of the locked version, the locked wheels, and
# this project. In the project's root:
#   docker build --platform linux/amd64 -t REGISTRY/alexnet:1 . && docker push REGISTRY/alexnet:1
FROM rayproject/ray:2.60.0-py311

USER root
# `ip`, by which cluster.yaml finds the nodes' network interface.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends iproute2 && rm -rf /var/lib/apt/lists/*
USER ray

COPY requirements.lock /home/ray/
# cluster.yaml's commands call the programs in ~/venv/bin.
RUN pip install --no-cache-dir -r /home/ray/requirements.lock && ln -s /home/ray/anaconda3 /home/ray/venv
COPY jobs /home/ray/alexnet/jobs
COPY model /home/ray/alexnet/model
COPY pipeline /home/ray/alexnet/pipeline
# Every Ray process finds the project here, so that the job uploads nothing.
ENV PYTHONPATH=/home/ray/alexnet
