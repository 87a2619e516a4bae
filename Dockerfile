# A box with NVIDIA GPUs, drivers and container toolkit.
#
#     docker build --tag coppice .
#     docker run --rm --gpus all --volume "$PWD/runs:/coppice/runs" \
#         --volume coppice-cache:/root/.cache coppice
#
# That trains the quickstart. Words at the end are those of `python train.py`.
FROM python:3.12-slim
WORKDIR /coppice
COPY requirements.txt ./
RUN pip install --no-cache-dir -U "jax[cuda13]" -r requirements.txt
COPY LICENSE README.md pyproject.toml train.py model.py data.py ./
COPY lib lib
COPY tools tools
COPY configs configs
COPY results results
ENTRYPOINT ["python", "train.py"]
