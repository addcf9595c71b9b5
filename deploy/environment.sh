# noisy-label-search: what every shell and every Ray process on a node of deploy/ray-cluster.yaml has.
export PATH="$HOME/venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"
export RAY_JOB_STOP_WAIT_TIME_S=30 # `ray job stop` kills after 3 s otherwise, before the epochs in progress are saved
export NOISY_LABEL_CACHE=/cache NOISY_LABEL_DATA=/storage/data-sets
