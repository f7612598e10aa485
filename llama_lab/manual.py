"""What the commands say of themselves when they are asked for help."""

EXIT_CODES = """\
Exit codes: 0 done, 1 failed, 2 the request has a mistake (nothing was started), 75 stopped by a signal with its state saved
(the same command goes on from there), 128 + signal (130, 143) stopped before it began, or by a second signal."""

OVERRIDES = """\
Overrides, in any order:
  group=option            swap a whole part            optim=muon
  group.field=value       set one field                optim.max_lr=1e-3
  node=null               leave a part out             eval=null  wandb=null
  experiment=preset       start from a preset          experiment=smoke"""

TRAIN_EXAMPLES = """\
Examples:
  llama-lab train                                           a small Llama on the documentation in your Python
  llama-lab train experiment=smoke                          the whole path in seconds
  llama-lab train optim.max_lr=3e-3 schedule=wsd            a variant; it gets a folder of its own
  llama-lab train data=text data.path=book.txt              your own text
  llama-lab train -m seed.init=0,1,2                        three runs side by side, and a table
  llama-lab train -m 'model.n_layers=range(2,9,2)'          the same with Hydra's range, choice and glob"""

PLAN_HELP = """\
usage: llama-lab plan [overrides...] [--gpu NAME] [--probe] [-m] [--config-dir DIR]

What `llama-lab train` would do with the same words, without starting it: size, compute, memory, time, price, files; with -m of each
run of a sweep and of all together. Text is prepared and cached on the way, so that tokens and epochs are counted, not guessed.

  --gpu NAME        as if on a machine with this GPU: H100, 8xH100, "A100 40GB", RTX 4090, …
  --probe           train ten updates first, to find out what the whole takes; it is remembered for such runs on this machine
  -m, --multirun    a sweep, as llama-lab train -m would start it
  --config-dir DIR  further options and presets

budget.gpu_hour_price=2.5 says a price; budget.gpu_hours=8 lets nothing start that is foreseen to take more (docs/planning.md).
llama-lab train --help WORD says what a part, a field or an option means."""

PREPARE_HELP = """\
usage: llama-lab prepare [overrides...] [--out DIR] [--config-dir DIR]

Text becomes tokens in files that runs read: once, on all cores, with little memory. Stopped or killed, the same command goes on
where it was and ends with the same bytes. Of the config only data and tokenizer count: llama-lab train --help data tokenizer says
what their fields mean.

  --out DIR         make this folder; copy it wherever you train. Without it, tokens go to the cache, where train finds them
  --config-dir DIR  further options and presets

Examples:
  llama-lab prepare data=text data.path=books/ --out shards/books                    .txt, .md, .jsonl(.gz/.xz/.zst), .parquet
  llama-lab prepare data=text data.path='web/*.jsonl.gz' tokenizer.vocab_size=32768  a vocabulary learned from the text
  llama-lab prepare data=text data.path=a.jsonl tokenizer=file tokenizer.path=tokenizer.json
  llama-lab prepare data=text data.path=a.jsonl data.ascii_only=true data.length=medium data.on_error=skip
  cat book.txt | llama-lab prepare data=text data.path=- --out shards/book
  llama-lab prepare data=shards data.path=old_npy_folder --out shards/new            tokens that others wrote
  llama-lab train data=shards data.path=shards/books tokenizer=file tokenizer.path=shards/books/tokenizer.json"""

DATA_HELP = """\
usage: llama-lab data inspect PATH [--verify] [--samples N] [--plot FILE] [--tokenizer FILE]
       llama-lab data replay RUN --update N

  inspect   what tokens are like: counts, lengths of documents, frequent tokens, decoded samples; --plot draws them, --verify
            compares every file with its checksum. PATH is a prepared folder, an entry of `llama-lab cache`, a run, or a bare
            folder of .npy or .bin files
  replay    which documents a run was fed in one update; RUN is its folder, its name, or the hash at the end of that

llama-lab data inspect --help and llama-lab data replay --help say more."""

FORK_HELP = """\
usage: llama-lab fork RUN [--update N] key=value... [--cfg] [--config-dir DIR]

A run of its own that starts from a checkpoint of RUN with other values: a longer budget, another schedule, rate, or data. Whatever
is not typed is RUN's, its hardware included. The same command again goes on with it, also once RUN is removed; so does
llama-lab fork FORK, with the fork's own folder and nothing else. RUN is a run's folder, its name, or the hash at the end of that.

  --update N        the checkpoint after update N, or last, or best by validation. Without it: last
  --cfg             print the fork's config, checked and resolved, and start nothing
  --config-dir DIR  further options

Model shape, vocabulary, optimizer, data.max_seq_len and data.tokens_per_update stay RUN's. llama-lab train --help WORD says what a
field means.

Examples, one trunk and two cool-downs:
  llama-lab train schedule=constant checkpoint.keep_every_tokens=1_000_000
  llama-lab fork outputs/runs/RUN --update 250 schedule=wsd schedule.cooldown_fraction=0.2 training_tokens=1_500_000
  llama-lab fork outputs/runs/RUN --update 250 schedule=linear training_tokens=1_500_000"""

IMPORT_HELP = """\
usage: llama-lab import FOLDER [overrides...] [--no-training] [--cfg] [--config-dir DIR]

A run that begins with the weights of a Hugging Face folder of the Llama architecture (also Qwen3's): grouped heads, rope scaling,
tied embeddings, any tokenizer.json. Shape and tokenizer are the folder's; data, optimizer, schedule and budget are typed as for
train, and have its defaults; llama-lab train --help WORD says what a field means. The same command again goes on with it.

  --no-training     make the run's folder alone: generate, evaluate, serve and export take it
  --cfg             print the run's config, checked and resolved, and start nothing
  --config-dir DIR  further options and presets

Without data.max_seq_len=… the context is what the model knows, up to 2048.

Examples:
  llama-lab import SmolLM2-135M data=text data.path=books/ data.tokens_per_update=65536 optim=adamw optim.max_lr=3e-5
  llama-lab import SmolLM2-135M --no-training"""
