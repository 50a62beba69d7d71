"""Wrong versions of the package, applied one by one to a copy; the tests named beside each must fail on it.

    python tests/mutations.py            # all of them: prints the survivors, exit code 1 if there are any
    python tests/mutations.py lora 17    # those of one module, or of a number

Each is a mistake someone could make. The libraries are imported once and every mutation runs in a fork, in a copy of the tree.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
P = "llm2vec_min"
M, L, W, E = "tests/test_model.py", "tests/test_lora.py", "tests/test_weights.py", "tests/test_encoder.py"
PO, PR, T = "tests/test_pooling.py", "tests/test_properties.py", "tests/test_tokenizer.py"
MN, SI, LO, DI, SE, SU = (
    f"tests/training/test_{name}.py" for name in ("mntp", "simcse", "loop", "distributed", "settings", "supervised")
)

# (file, right, wrong, tests that must notice)
MUTATIONS = [
    # ---- model ----
    (f"{P}/model.py", "F.rms_norm(x, self.weight.shape, self.weight, self.eps)", "F.rms_norm(x, self.weight.shape, None, self.eps)", M),
    (f"{P}/model.py", "self.weight, self.eps)", "self.weight, 1e-6)", M),
    (f"{P}/model.py", "x.roll(x.shape[-1] // 2, dims=-1)", "x.roll(1, dims=-1)", M),
    (f"{P}/model.py", "torch.cat([-sin, sin], dim=-1)", "torch.cat([sin, -sin], dim=-1)", M),
    (f"{P}/model.py", "return frequencies / scaling[\"factor\"]", "return frequencies * scaling[\"factor\"]", M),
    (f"{P}/model.py", "keep * frequencies + (1 - keep) * frequencies / scaling[\"factor\"]", "keep * frequencies / scaling[\"factor\"] + (1 - keep) * frequencies", M),
    (f"{P}/model.py", "visible = (ahead <= 0) if causal", "visible = (ahead < 0) if causal", f"{M} {PR}"),
    (f"{P}/model.py", "(ahead > -sliding_window)", "(ahead >= -sliding_window)", f"{M} {PR}"),
    (f"{P}/model.py", "(ahead.abs() <= sliding_window)", "(ahead.abs() < sliding_window)", f"{M} {PR}"),
    (f"{P}/model.py", "(visible & padding_mask[:, None, None, :]) | (ahead == 0)", "visible & padding_mask[:, None, None, :]", f"{M} {PR}"),
    (f"{P}/model.py", "is_causal=causal and mask is None", "is_causal=mask is None", M),
    (f"{P}/model.py", "(k * D**-0.5).transpose", "k.transpose", M),
    (f"{P}/model.py", "hiding.repeat(1, 1, H // K, 1)", "hiding.repeat_interleave(H // K, dim=2)", M),
    (f"{P}/model.py", "return padding_mask[:, None, None, :]  # (B", "return None  # (B", M),
    (f"{P}/fast.py", "mul_(1 / (1 - probability))", "mul_(1.0)", f"{M} {SI}"),
    (f"{P}/fast.py", "(x.numel() + 3) // 4", "x.numel() // 4", M),
    (f"{P}/fast.py", "int(torch.randint(2**62, (), device=x.device))", "0", f"{M} {SI}"),
    (f"{P}/model.py", "self.dropout if self.training else 0.0", "self.dropout", f"{M} {SI}"),
    (f"{P}/model.py", "swiglu(self.gate_proj(x), self.up_proj(x))", "swiglu(self.up_proj(x), self.gate_proj(x))", M),
    (f"{P}/model.py", "bias=config.attention_bias and config.model_type != \"qwen2\"", "bias=config.attention_bias", M),
    (f"{P}/model.py", "self.post_attention_layernorm(x)", "self.input_layernorm(x)", M),
    # ---- lora ----
    (f"{P}/lora.py", "return self.alpha / self.r", "return self.alpha", f"{L} {W}"),
    (f"{P}/lora.py", "nn.init.zeros_(self.lora_B.weight)", "nn.init.normal_(self.lora_B.weight)", L),
    (f"{P}/lora.py", "dropout(rows, self.dropout, self.training)", "rows", f"{L} {SI}"),
    (f"{P}/lora.py", "(self.weight.float() + update)", "(self.weight + update.to(self.weight.dtype))", f"{L} {W}"),
    (f"{P}/lora.py", "    model.requires_grad_(False)\n", "", f"{L} {W}"),
    (f"{P}/lora.py", "return linear.train(self.training)", "return linear", L),
    (f"{P}/lora.py", "linear.bias = self.bias", "linear.bias = None if self.bias is None else torch.zeros_like(self.bias)", L),
    # ---- pooling ----
    (f"{P}/pooling.py", "hidden = hidden.float()", "hidden = hidden + 0", PO),
    (f"{P}/pooling.py", "(order * pool_mask).float()", "order.float()", PO),
    (f"{P}/pooling.py", "(order == order[:, -1:])", "(order == order[:, -1:] - 1)", PO),
    (f"{P}/pooling.py", "hidden.masked_fill(~pool_mask[:, :, None], -torch.inf)", "hidden.masked_fill(~pool_mask[:, :, None], 0)", PO),
    (f"{P}/pooling.py", "weights = pool_mask.float()", "weights = torch.ones_like(pool_mask).float()", PO),
    # ---- tokenizer ----
    (f"{P}/tokenizer.py", "& ~inserted", "", f"{T} {PR}"),
    (f"{P}/tokenizer.py", "len(head) - head.endswith(\" \")", "len(head)", f"{T} {PR}"),
    (f"{P}/tokenizer.py", "(ends > begin) & (starts < stop)", "(starts >= begin) & (starts < stop)", f"{T} {PR}"),
    (f"{P}/tokenizer.py", "np.delete(x, own[-surplus:])", "np.delete(x, own[:surplus])", f"{T} {PR}"),
    (f"{P}/tokenizer.py", "input_ids[b, T - length :] = row.ids", "input_ids[b, :length] = row.ids", T),
    (f"{P}/tokenizer.py", "(max_length + MARGIN) * self._longest", "max_length", PR),
    # ---- mntp ----
    (f"{P}/training/mntp.py", "maskable[:, 0] = False", "", f"{MN} {PR}"),
    (f"{P}/training/mntp.py", "F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()", "labels.flatten()", MN),
    (f"{P}/training/mntp.py", "(fate >= 0.9)", "(fate >= 0.8)", MN),
    (f"{P}/training/mntp.py", "max(1, len(targets))", "len(targets)", MN),
    (f"{P}/training/mntp.py", "~torch.isin(input_ids, torch.tensor(sorted(special_ids), dtype=torch.int64))", "torch.ones_like(input_ids, dtype=torch.bool)", f"{MN} {PR}"),
    (f"{P}/training/mntp.py", "decoder(masked_ids, causal=False)", "decoder(masked_ids, causal=True)", MN),
    (f"{P}/training/mntp.py", "labels[rows], count)", "labels[rows])", LO),
    # ---- simcse ----
    (f"{P}/training/simcse.py", "F.normalize(queries, dim=-1) @", "queries @", SI),
    (f"{P}/training/simcse.py", "cosines / temperature", "cosines * temperature", SI),
    (f"{P}/training/simcse.py", "l2v.states(encoded + encoded)", "l2v.states(encoded + encoded[::-1])", f"{SI} {DI}"),
    (f"{P}/training/simcse.py", "            loop.seed_dropout(part)\n", "", f"{DI} {LO} {SE}"),
    (f"{P}/training/simcse.py", "loss_of(vectors) / world_size()", "loss_of(vectors)", DI),
    (f"{P}/training/simcse.py", "world_size() * vectors.grad", "vectors.grad", DI),
    (f"{P}/training/simcse.py", "loss.backward()  # as far", "vectors.grad = torch.autograd.grad(loss, vectors)[0]  # as far", SI),
    (f"{P}/training/loop.py", "if len(unreached) == len(self.parameters):", "if False:", LO),
    (f"{P}/encoder.py", "self.named_parameters() if p.requires_grad and", "self.decoder.named_parameters() if p.requires_grad and", "tests/test_encoder.py"),
    (f"{P}/training/simcse.py", ".chunk(world_size())[rank()]", ".chunk(world_size())[0]", DI),
    # ---- supervised ----
    (f"{P}/training/supervised.py", "right[query, t.instruction] |= {query, positive}", "right[query, t.instruction] |= {positive}", SU),
    (f"{P}/training/supervised.py", "settings.in_batch_negatives, seen)", "settings.in_batch_negatives)", SU),
    (f"{P}/training/supervised.py", "(owner == row[:, None]) | in_batch", "torch.ones(len(triplets), len(owner), dtype=torch.bool)", SU),
    (f"{P}/training/supervised.py", "    compared[row, row] = True\n", "", SU),
    (f"{P}/training/supervised.py", "t.instruction if t.symmetric else \"\"", "t.instruction", SU),
    (f"{P}/training/supervised.py", "sizes = [*matryoshka, vectors.shape[1]]", "sizes = [vectors.shape[1]]", SU),
    (f"{P}/training/supervised.py", "<= share * positive", "<= positive", SU),
    (f"{P}/training/supervised.py", "vectors[places], compared, settings.temperature", "vectors[places], compared, 0.02", SU),
    (f"{P}/training/supervised.py", "if settings.filter_negatives:\n        drawn", "if False:\n        drawn", SU),
    (f"{P}/training/supervised.py", "flatten(batch), max_length=settings.max_length)\n        compared", "flatten(batch), max_length=512)\n        compared", SU),
    (f"{P}/training/supervised.py", "flatten(rows), max_length=max_length)", "flatten(rows))", SU),
    (f"{P}/training/supervised.py", "if len(rows):\n", "if False:\n", SU),
    (f"{P}/training/triplets.py", "(t.query, t.instruction, text) not in right", "True", SU),
    (f"{P}/training/triplets.py", "[Path(os.path.abspath(path)) for path in paths]", "[Path(path) for path in paths]", SU),
    (f"{P}/training/triplets.py", "all(every <= known for known in right.values())", "False", SU),
    # ---- distributed ----
    (f"{P}/training/distributed.py", "    dist.all_reduce(flat)\n", "", DI),
    (f"{P}/training/distributed.py", "dist.all_gather_into_tensor(rows, x.detach().contiguous())", "rows[: len(x)] = x.detach()", DI),
    # ---- loop ----
    (f"{P}/training/loop.py", "self.generator = seed_torch(s.seed, self.step)", "self.generator = seed_torch(s.seed)", f"{LO} {SE}"),
    (f"{P}/training/loop.py", "self.settings.seed, self.step, rank() + 1, part)", "self.settings.seed, self.step, 1, part)", f"{DI} {SE}"),
    (f"{P}/training/loop.py", "group[\"lr\"] = self.lr", "pass", f"{LO} {SE}"),
    (f"{P}/encoder.py", "if threads > 1:", "if False:", E),
    (f"{P}/encoder.py", "key=lambda i: -lengths[i]", "key=lambda i: lengths[i]", f"{E} {PR}"),
    # ---- every field of Settings, ignored ----
    (f"{P}/training/loop.py", "range(self.start, s.steps)", "range(self.start, 7)", SE),
    (f"{P}/training/loop.py", "share = self.settings.batch_size // world_size()", "share = 4 // world_size()", SE),
    (f"{P}/training/loop.py", "rank() * share, self.settings.micro_batch_size or share", "rank() * share, share", SE),
    (f"{P}/training/settings.py", "return settings.lr * (1 - progress)", "return 1e-3 * (1 - progress)", f"{LO} {SE}"),
    (f"{P}/training/settings.py", "if step < settings.warmup_steps:", "if False:", f"{LO} {SE}"),
    (f"{P}/training/settings.py", "if settings.schedule == \"cosine\":", "if False:", f"{LO} {SE}"),
    (f"{P}/training/loop.py", "weight_decay=settings.weight_decay", "weight_decay=0.0", SE),
    (f"{P}/training/loop.py", "settings.adam_beta2", "0.999", SE),
    (f"{P}/training/loop.py", "self.settings.max_grad_norm", "1.0", SE),
    (f"{P}/training/loop.py", "s.eval_every or -(-s.steps // 4)", "-(-s.steps // 4)", SE),
    (f"{P}/training/loop.py", "(s.save_every and done % s.save_every == 0)", "False", f"{LO} {SE}"),
    (f"{P}/training/mntp.py", "probability=settings.mask_probability", "probability=0.2", SE),
    (f"{P}/training/mntp.py", "style=settings.mask_style", "style=\"bert\"", SE),
    (f"{P}/training/simcse.py", "set_attention_dropout(l2v.decoder, settings.attention_dropout)", "set_attention_dropout(l2v.decoder, 0.3)", SE),
    (f"{P}/training/simcse.py", "settings.temperature, compared)", "0.05, compared)", SE),
    (f"{P}/training/simcse.py", "encode(sentences, max_length=settings.max_length)", "encode(sentences, max_length=512)", SE),
    # ---- flags that train.py itself acts on ----
    ("train.py", "args.lora_r, args.lora_alpha, args.lora_dropout)", "16, args.lora_alpha, args.lora_dropout)", SE),
    ("train.py", "args.lora_r, args.lora_alpha, args.lora_dropout)", "args.lora_r, 32.0, args.lora_dropout)", SE),
    ("train.py", "args.lora_r, args.lora_alpha, args.lora_dropout)", "args.lora_r, args.lora_alpha, 0.05)", SE),
    (f"{P}/training/loop.py", "        self.optimizer.zero_grad(set_to_none=True)\n        for module", "        for module", LO),
    (f"{P}/training/loop.py", "tensors |= {f\"buffer.{name}\": buffer for name, buffer in self.model.named_buffers()}", "pass", LO),
    (f"{P}/training/loop.py", "with kept_random_state(next(iter(self.parameters.values())).device):", "if True:", LO),
    (f"{P}/training/loop.py", "module.gradient_checkpointing |= settings.gradient_checkpointing", "pass", LO),
    ("train.py", "pack_blocks(l2v.tokenizer, train_lines, args.max_length, \"--data\")", "pack_blocks(l2v.tokenizer, train_lines, 16, \"--data\")", SE),
    ("train.py", "pooling=args.pooling,", "", SE),
    ("train.py", "adapters=args.adapter,", "", SE),
    ("train.py", "causal=args.causal,", "", f"tests/test_cli.py {SE}"),
    ("train.py", "torch.manual_seed(args.seed)\n    add_lora", "add_lora", SE),
    ("train.py", "dtype=args.dtype,", "", SE),
    (f"{P}/lora.py", "        self.train(base.training)\n", "", L),
    (f"{P}/weights.py", "if not math.isfinite(total)]", "if False]", W),
    (f"{P}/weights.py", "missing += absent + [name for name in expected if name not in targets]", "pass", W),
    (f"{P}/weights.py", "and not ends_with(name, without)", "", W),
    (f"{P}/weights.py", "if name in whole or layer_of", "if layer_of", W),
    (f"{P}/weights.py", "unexpected += sorted(targets - set(expected))", "pass", W),
    (f"{P}/weights.py", "kinds if on_all else sorted(layers)", "kinds", W),
    (f"{P}/weights.py", "    if others:\n", "    if False:\n", W),
    (f"{P}/weights.py", 'str(name).removeprefix("model.") for', "str(name) for", W),
    (f"{P}/lora.py", 'getattr(model, "changes", 0) + bool(names)', "0", E),
    (f"{P}/lora.py", "if adapted := [", "if adapted := [][:0] and [", L),
    (f"{P}/encoder.py", "    folder = resolve(name, FILES)\n", "    folder = resolve(name)\n", "tests/test_hub_server.py"),
    (f"{P}/encoder.py", "        if lost:\n", "        if False:\n", E),
    (f"{P}/encoder.py", "if ours and (unknown", "if False and (unknown", E),
    (f"{P}/encoder.py", "!= len(self.adapters):", "!= changes:", E),
    (f"{P}/encoder.py", "        config, tensors = adapter_of(", "        self.keep_adapters(output / \"adapters\")\n        config, tensors = adapter_of(", E),
    (f"{P}/encoder.py", "if place.is_relative_to(home) and place", "if False and place", E),
    (f"{P}/encoder.py", "and place != home / \"adapters\" / str(number):", "and True:", E),
    (f"{P}/encoder.py", "            if not file.is_file():", "            if False:", E),
    (f"{P}/encoder.py", "for module in self.modules())", "for module in (self, self.decoder))", E),
    (f"{P}/encoder.py", "weight.numel() // 256) | 1", "weight.numel() // 256)", E),
    (f"{P}/fast.py", "    compiled = None\n", "    compiled = torch.compile(function, dynamic=True)\n", "tests/test_imports.py"),
    (f"{P}/training/simcse.py", "if min(len(sentences), settings.batch_size) < 2:", "if False:", LO),
    (f"{P}/training/mntp.py", "if l2v.lm_head is None:", "if False:", LO),
    (f"{P}/training/flags.py", "args.output = str(Path(expanduser(args.output)))", "args.output = expanduser(args.output)", SE),
    (f"{P}/training/output.py", "vars(Settings()).items()} | read_json", "vars(Settings()).items() if False} | read_json", LO),
    (f"{P}/files.py", "    if leads_nowhere:", "    if False:", "tests/test_hostile.py"),
    (f"{P}/files.py", "path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)", "pass", W),
    (f"{P}/files.py", "LOCK_EX | (0 if wait else fcntl.LOCK_NB)", "LOCK_EX | fcntl.LOCK_NB", W),
    (f"{P}/training/loop.py", "        if broken:\n            what =", "        if False:\n            what =", "tests/test_cli.py"),
    (f"{P}/training/loop.py", "2 * self.skipped > steps", "self.skipped == self.settings.steps", LO),
    (f"{P}/training/memory.py", "noisy or T <= SHORT[size]", "noisy or T < SHORT[size]", "tests/training/test_memory.py"),
    (f"{P}/training/memory.py", "(3 if noisy else 1) * size", "size", "tests/training/test_memory.py"),
    (f"{P}/training/mntp.py", "settings.batch_size // world_size()  # as many as in training", "settings.batch_size", LO),
    (f"{P}/hub.py", '    "adapters/*/adapter_config.json",  # the earlier stages of a run\n', "", "tests/test_hub_server.py"),
    (f"{P}/interop/export.py", '"padding_side": "right"', '"padding_side": "left"', "tests/interop/test_export.py"),
    ("embed.py", "        check_part(part, done_file, made_from)\n", "", "tests/test_cli.py"),
    ("train.py", "held_out[some]", "held_out[:HELD_OUT]", "tests/test_cli.py"),
    (f"{P}/training/loop.py", "if ours.get(key) != theirs.get(key)", "if (key in ours) != (key in theirs)", LO),
    (f"{P}/training/supervised.py", "distributed.broadcast([agreed])", "pass", SU),
    (f"{P}/encoder.py", "repr([m.scaling for m", "repr([0 for m", E),
    (f"{P}/encoder.py", "names[: names.index(own) + 1]", "[own]", E),
    (f"{P}/config.py", 'known["sliding_window"] = raw[KEPT_WINDOW]', "pass", E),
    (f"{P}/evaluation/sentences.py", "if len(np.unique(gold[rows])) == 1:", "if False:", "tests/evaluation/test_compare.py"),
    (f"{P}/evaluation/compare.py", ', "template": "template"}', "}", "tests/evaluation/test_compare.py"),
    # ---- what no test noticed before a reviewer tried it ----
    (f"{P}/model.py", "torch.arange(T, device=device).float()", "torch.arange(T, device=device).to(dtype)", M),
    (f"{P}/training/mntp.py", "F.cross_entropy(lm_head(hidden).float(), targets", "F.cross_entropy(lm_head(hidden), targets", MN),
    (f"{P}/tokenizer.py", "        self.backend.no_truncation()\n", "", T),
    (f"{P}/weights.py", '"modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias",', '"rank_pattern",', W),
    (f"{P}/encoder.py", "return base, [*chain, folder], before | settings", "return base, [*chain, folder], settings | before", E),
    (f"{P}/encoder.py", "filecmp.cmp(one, other, shallow=False):", "False:", E),
    (f"{P}/encoder.py", "(*reversed(chain), base_folder)  #", "(base_folder, *chain)  #", E),
    (f"{P}/config.py", '("<|start_header_id|>user<|end_header_id|>\\n\\n", "<|eot_id|>")', '("", "<|eot_id|>")', "tests/test_hub.py"),
    (f"{P}/training/simcse.py", "with torch.set_grad_enabled(parts == 1):", "with torch.set_grad_enabled(True):", SI),
    (f"{P}/training/loop.py", "self.stopped = stop > 0", "self.stopped = self.stopping", LO),
    (f"{P}/evaluation/sentences.py", "permutation(count)[:limit])", "permutation(min(count, limit or count)))", "tests/evaluation/test_sentences.py"),
    (f"{P}/evaluation/sentences.py", "runs = np.random.default_rng(rows).integers(0, 10, 10)", "pass", "tests/evaluation/test_sentences.py"),
    (f"{P}/evaluation/compare.py", "np.nanquantile(draws, [0.025, 0.975])", "np.nanquantile(draws, [0.05, 0.95])", "tests/evaluation/test_compare.py"),
    ("embed.py", "        causal=args.causal,\n", "", "tests/test_arguments.py"),
    (f"{P}/interop/export.py", "        normalize=args.normalize,\n", "", "tests/test_arguments.py"),
]  # fmt: skip


def is_caught(copy: Path, tests: str, log: Path) -> bool:
    """In a fork: do the tests fail in the copy?"""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(copy / "tests")]
            import pytest

            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests.split()])
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1, 2), f"pytest ended with {code}: {log.read_text()[-2000:]}"  # 2: the tests cannot even be imported
    return code != 0


def main(wanted: list[str]) -> int:
    sys.dont_write_bytecode = True  # a mutation of the same length within a second would be taken from the cache
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import hypothesis  # noqa: E401, F401

    survivors = []
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "notebooks", "runs"))
        for number, (file, right, wrong, tests) in enumerate(MUTATIONS):
            if wanted and not any(word == str(number) or word == Path(file).stem for word in wanted):
                continue
            source = (copy / file).read_text()
            (copy / file).write_text(source.replace(right, wrong, 1))
            started = time.monotonic()
            caught = is_caught(copy, tests, Path(place) / "log")
            (copy / file).write_text(source)
            print(
                f"{number:>3} {'caught' if caught else 'SURVIVES'} {time.monotonic() - started:4.0f} s  {file}: {right.strip()[:60]!r}",
                flush=True,
            )
            if not caught:
                survivors.append(number)
    print(f"{len(survivors)} survivors: {survivors}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
