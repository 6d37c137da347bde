"""Would the tests of the method files notice? Small faults, put in one at a time, each of which has to make a test fail.

    python tests/mutations.py                       all of them, about half an hour
    python tests/mutations.py --list                their names
    python tests/mutations.py --only NAME NAME      some of them; a part of a name is enough
    python tests/mutations.py --jobs 2              so many at a time

Every fault is put into a copy of the repository, where the tests named beside it run. caught: a test failed. survived: none did.
broken: they could not run to their end (no import, nothing collected, a hang), so the fault shows nothing and does not count as caught.
Exit code 0 if at least 95 % are caught. The kernel's mutations are in test_kernel_mutations.py.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT = 240  # seconds for the tests of one fault
COMMON, EQUATIONS, ROLLOUTS, TOOLS, RUNS = (f"tests/test_{name}.py" for name in ("common", "vgs_equations", "rollouts", "tools", "runs"))
VGS, VOLD, PTDPO, VIGOS, REOPOLD = (f"tests/test_{name}_exact.py" for name in ("vgs", "vold", "ptdpo", "vigos", "reopold"))
RANKS, RESUME = "tests/test_distributed.py -k two_ranks_train", "tests/test_resume.py -k 'undisturbed and {}'".format
SHAPES = "tests/test_distributed.py -k 'other_shapes and {}'".format  # gradients on one rank and on two

# name, file, text that occurs once in it, what stands there instead, tests: a file, or a file and -k with what picks some of it
FAULTS = [
    # ---------------------------------------------------------------------------------------------------- common.py: ranks
    ("sums are not taken over the ranks", "common.py", "        dist.all_reduce(x)\n", "        pass\n", RANKS),
    ("a quantile is that of this rank's tokens", "common.py", "x = all_gather(x).sort().values", "x = x.sort().values", SHAPES("adaptive")),
    ("a rank without work gets no micro-batches", "common.py", "return groups + [[]] * (max(all_gather_object(len(groups))) - len(groups))",
     "return groups", f"{COMMON} -k micro_batches"),
    ("two updates get other questions on two ranks", "common.py", "for part in split(numbered, self.updates) for n, i in my_share(part)]",
     "for n, i in my_share(numbered)]", f"{COMMON} -k questions"),
    ("every epoch has the order of the first", "common.py", "torch.randperm(rows, generator=generator).tolist()",
     "torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()", f"{COMMON} -k data_order"),
    # ---------------------------------------------------------------------------------------------------- common.py: encoding
    ("hidden states at the response's tokens, not before them", "common.py", "[place - 1 for at in places for place in at]",
     "[place for at in places for place in at]", f"{COMMON} -k batch_points"),
    ("an observation stands before what was said", "common.py", "whole += ids[start:end] + seen", "whole += seen + ids[start:end]",
     f"{TOOLS} -k transcript"),
    ("an observation comes a token too early", "common.py", "response.observations.append(Observation(len(response.ids), turn, text, failed))",
     "response.observations.append(Observation(len(response.ids) - 1, turn, text, failed))", f"{TOOLS} -k turns"),
    ("what a tool says counts as response", "common.py", "response.observations.append(Observation(len(response.ids), turn, text, failed))",
     "response.ids, response.log_probs = response.ids + turn.ids, response.log_probs + [0.0] * len(turn.ids)\n        "
     "response.observations.append(Observation(len(response.ids), Prompt([], turn.pixels, turn.grid, turn.images), text, failed))",
     f"{TOOLS} -k turns"),
    ("the image stays in a context without images", "common.py", 'content = [{"type": "image"}] * images + (', 'content = [{"type": "image"}] * max(images, marks) + (',
     f"{COMMON} -k user_message"),
    ("the padding rows of the heads are used", "common.py", "vocab = min([processor.vocab, student.vocab] +", "vocab = min([student.vocab] +", VGS),
    # ---------------------------------------------------------------------------------------------------- common.py: sampling
    ("the end token is forgotten", "common.py", "kept = ids[: end or limit]", "kept = ids[: end - 1 if end else limit]", f"{ROLLOUTS} -k greedy"),
    ("prompts are padded on the right for sampling", "common.py", "self.processor.pad(part, left=True)", "self.processor.pad(part)", ROLLOUTS),
    ("placeholders can be sampled", "common.py", "self.banned = processor.banned + list(range(processor.vocab, width))",
     "self.banned = list(range(processor.vocab, width))", f"{ROLLOUTS} -k never_sampled"),
    ("padding rows can be sampled", "common.py", "self.banned = processor.banned + list(range(processor.vocab, width))",
     "self.banned = processor.banned", f"{ROLLOUTS} -k never_sampled"),
    ("the temperature is ignored", "common.py", "bend.append(TemperatureLogitsWarper(temperature))", "bend.append(TemperatureLogitsWarper(1.0))",
     f"{ROLLOUTS} -k distribution_sampled_from"),
    ("top-k is ignored beside top-p", "common.py", "if temperature and top_k:", "if temperature and top_k and top_p == 1:",
     f"{ROLLOUTS} -k distribution_sampled_from"),
    ("responses are drawn without seeds of their own", "common.py", "args.temperature, args.top_p, args.top_k, seeds=seeds)\n    engine.rest()",
     "args.temperature, args.top_p, args.top_k)\n    engine.rest()", RANKS),
    ("a group's responses have one seed", "common.py", 'seed_of(args.seed, row.get("draw", row["index"]), i)',
     'seed_of(args.seed, row.get("draw", row["index"]))', ROLLOUTS),
    ("a question's seed is the same in every epoch", "common.py", 'seed_of(args.seed, row.get("draw", row["index"]), i)',
     'seed_of(args.seed, row["index"], i)', ROLLOUTS),
    ("draws are numbered anew in every batch", "common.py", "list(enumerate(numbers, self.drawn * len(numbers)))", "list(enumerate(numbers))",
     f"{COMMON} -k questions"),
    # ---------------------------------------------------------------------------------------------------- common.py: losses
    ("KL is weighted by the other distribution", "common.py", "return (log_a.exp() * (log_a - log_b)", "return (log_b.exp() * (log_a - log_b)",
     f"{COMMON} -k kl_and"),
    ("the head's gradient ignores the incoming one", "common.py", "grad_head if grad_head is None else grad_head * grad_total", "grad_head",
     f"{COMMON} -k vocab_loss_equals"),
    ("only the last chunk's gradient of the head is kept", "common.py",
     "grad_head[:vocab].add_(g.T @ h[rows]) if wide != head.dtype else grad_head[:vocab].addmm_(g.T, h[rows])",
     "grad_head[:vocab].copy_(g.T @ h[rows])", f"{COMMON} -k vocab_loss_equals"),
    ("advantages over the biased deviation", "common.py", "r.std(-1, keepdim=True)", "r.std(-1, keepdim=True, correction=0)",
     f"{EQUATIONS} -k group_advantages"),
    ("advantages over all responses of the batch", "common.py", "(r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + eps)",
     "(r - r.mean()) / (r.std() + eps)", f"{EQUATIONS} -k group_advantages"),
    ("max for min in the clipped surrogate", "common.py", "return torch.minimum(ratio * advantages", "return torch.maximum(ratio * advantages",
     f"{EQUATIONS} -k clipped_surrogate"),
    ("the clips of both sides are exchanged", "common.py", "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - high, 1 + low)",
     f"{EQUATIONS} -k clipped_surrogate"),
    ("k3 the wrong way round", "common.py", "log_ratio = reference - log_p", "log_ratio = log_p - reference", "tests/test_ptdpo.py -k k3"),
    ("a response's ratio is not divided by its length", "common.py", "(now - old) / divisor)", "now - old)", "tests/test_ptdpo.py -k gspo_ratio"),
    ("the contexts' tokens are dealt out in turn", "common.py", "return list(hidden.split(n)) if n else [hidden] * self.contexts",
     "return [hidden[i :: self.contexts] for i in range(self.contexts)]", VGS),
    # ---------------------------------------------------------------------------------------------------- common.py: answers
    ("an answer that was cut off is rewarded", "common.py", "sample.correct = sample.response.finished and is_correct(",
     "sample.correct = is_correct(", "tests/test_vold.py -k cut_off_is_wrong"),
    ("an answer that holds the right one is right", "common.py", "if ours.casefold() == gold.casefold():", "if gold.casefold() in ours.casefold():",
     f"{COMMON} -k is_correct"),
    ("the first box counts", "common.py", "last = max(last, (opened.pop(), match.start()))", "last = last if last[0] >= 0 else (opened.pop(), match.start())",
     "tests/test_untrusted.py -k complete_box"),
    ("what is transparent becomes black", "common.py", "    if image.has_transparency_data:\n", "    if False:\n", "tests/test_untrusted.py -k transparent"),
    ("of several answers only the first is looked at", "common.py", "for one in right):  # NaN", "for one in right[:1]):  # NaN", "tests/test_inputs.py -k several_answers"),
    ("a server's words are shown, whatever they quote", "common.py", "quoted = any(", "quoted = False and any(", "tests/test_ptdpo.py -k 'quotes_the_request or nonsense'"),
    ("an innocent rank is blamed", "common.py", "values if any(values) else gradients", "gradients", "tests/test_faults.py -k vgs.py-loss-nan"),
    ("the sampler is compared with a policy that has moved", "common.py", 'if key != "sampler_gap" or key not in self.values:', "if True:", f"{ROLLOUTS} -k left_behind"),
    ("the evaluation counts refused answers", "common.py", "greedy = [not r.refused and is_correct(", "greedy = [is_correct(",
     f"{ROLLOUTS} -k evaluat"),
    ("the evaluation samples what it calls greedy", "common.py", "engine.generate(prompts, 0.0)", "engine.generate(prompts, 1.0)",
     f"{ROLLOUTS} -k evaluat"),
    ("maj@k takes the first answer", "common.py", "right[given.index(Counter(given).most_common(1)[0][0])]", "right[0]", f"{ROLLOUTS} -k evaluat"),
    ("pass@k wants all answers right", "common.py", "sums[3] += any(right)", "sums[3] += all(right)", f"{ROLLOUTS} -k evaluat"),
    # ---------------------------------------------------------------------------------------------------- common.py: optimizer
    ("norms decay", "common.py", '"weight_decay": 0.0}', '"weight_decay": args.weight_decay}', f"{COMMON} -k schedules"),
    ("the first update of a warm-up has no learning rate", "common.py", "return (step + 1) / (args.warmup + 1)", "return step / args.warmup",
     f"{COMMON} -k schedules"),
    ("a gradient that is not finite is taken", "common.py", "if not math.isfinite(value):", "if math.isnan(lr):", f"{RUNS} -k non_finite"),
    ("the weights move before the gradient is looked at", "common.py", "    value = (norm + 0.0 * all_sum(loss)).item()",
     "    models.optimizer.step()\n    value = (norm + 0.0 * all_sum(loss)).item()", f"{COMMON} -k clip_and_step"),
    ("gradients are not clipped", "common.py",
     "    torch.nn.utils.clip_grads_with_norm_([p for p in models.student.parameters() if p.requires_grad], limit, norm)\n", "",
     f"{COMMON} -k clip_and_step"),
    ("gradients pile up over the updates", "common.py", "    models.schedule.step()\n    models.optimizer.zero_grad()\n", "    models.schedule.step()\n",
     RESUME("reopold")),
    ("the vision tower is not frozen", "common.py", "model.lm.model.visual.requires_grad_(False)", "model.lm.model.visual.requires_grad_(True)",
     f"{RUNS} -k steer"),
    ("adapters are merged without their scale", "common.py", "full = full + 2 * (b.float()", "full = full + (b.float()",
     "tests/test_vigos.py -k adapters_off"),
    ("adapters have scale 1", "common.py", "lora_alpha=2 * rank", "lora_alpha=rank", f"{VIGOS} -k lora"),
    ("adapters stay off once the teacher has read", "common.py", 'module.set_scale("default", 1.0)', 'module.set_scale("default", 0.0)',
     "tests/test_vigos.py -k adapters_off"),
    # ---------------------------------------------------------------------------------------------------- common.py: resume
    ("a resumed run draws the same questions again", "common.py", 'questions.skip(saved["drawn"])', "questions.skip(0)", RESUME("reopold")),
    ("a resumed run's schedule counts steps for updates", "common.py", 'schedule.last_epoch = progress["step"] * self.args.updates',
     'schedule.last_epoch = progress["step"]', RESUME("reopold")),
    ("a resumed run forgets the method's own numbers", "common.py", 'self.own, self.warned = saved["own"], False',
     "self.own, self.warned = {}, False", RESUME("vgs")),
    ("a resumed run samples from the initial weights", "common.py", "        models.engine.sync(models.student.weights())\n        return progress",
     "        return progress", RESUME("reopold")),
    ("the oldest checkpoints are kept", "common.py", "states_in(self.path)[: -self.args.keep]", "states_in(self.path)[self.args.keep :]",
     "tests/test_resume.py -k killed"),
    # ---------------------------------------------------------------------------------------------------- vgs.py
    ("gradient flows through pL inside q*", "vgs.py", "return (pL.detach() + gain)", "return (pL + gain)", f"{EQUATIONS} -k gradient"),
    ("q* with the teacher's distributions exchanged", "vgs.py", "gain = (qI - qL)", "gain = (qL - qI)", f"{EQUATIONS} -k values"),
    ("q* is not normalised", "vgs.py", "return (pL.detach() + gain).log_softmax(-1)", "return pL.detach() + gain", f"{EQUATIONS} -k values"),
    ("Std the wrong way round", "vgs.py", "return common.kl(pI, qI),", "return common.kl(qI, pI),", f"{EQUATIONS} -k values"),
    ("Vis the wrong way round", "vgs.py", "common.kl(pI, q_star)", "common.kl(q_star, pI)", f"{EQUATIONS} -k values"),
    ("Lang reads the student with the image", "vgs.py", "common.kl(pL, qL), common.kl(qI, qL)", "common.kl(pI, qL), common.kl(qI, qL)",
     f"{EQUATIONS} -k values"),
    ("visual dependency the wrong way round", "vgs.py", "common.kl(yI.log_softmax(-1), yL.log_softmax(-1))",
     "common.kl(yL.log_softmax(-1), yI.log_softmax(-1))", VGS),
    ("the preserving term takes the 30th percentile", "vgs.py", "torch.tensor([0.4, 0.7])", "torch.tensor([0.4, 0.3])",
     f"{EQUATIONS} -k response_means"),
    ("the preserving term takes the percentile itself too", "vgs.py", "(vds > q70).to(vds.dtype)", "(vds >= q70).to(vds.dtype)",
     f"{EQUATIONS} -k coefficients"),
    ("lang-steer steers by Vis", "vgs.py", "torch.stack([one, lam * top, gamma * one])", "torch.stack([one, gamma * one, lam * top])",
     f"{EQUATIONS} -k coefficients"),
    ("adaptive has gamma from Q0.4 on", "vgs.py", "gamma / 2 * (vds > q40) + gamma / 2 * top", "gamma * (vds > q40)", f"{EQUATIONS} -k coefficients"),
    ("the question alone is given the image", "vgs.py", 'common.user_message(row["problem"], 0)])',
     'common.user_message(row["problem"], len(row["images"]))], row["images"])', f"{ROLLOUTS} -k text_only"),
    ("the teacher's contexts are exchanged", "vgs.py", "m.by_context(models.teacher(m.batch))", "m.by_context(models.teacher(m.batch))[::-1]", VGS),
    ("mean over tokens, not over responses", "vgs.py", "mean = 1 / (m.length * responses)",
     "mean = torch.ones_like(m.length) / sum(len(x.ids) for x in micros)", f"{EQUATIONS} -k response_means"),
    ("vgs: this rank's responses are the divisor", "vgs.py", "common.all_sum(torch.cat([1 / m.length for m in micros]).sum()).round()",
     "torch.cat([1 / m.length for m in micros]).sum().round()", RANKS),
    ("vgs: the gradient is the mean over the ranks", "vgs.py", "(loss * common.world_size()).backward()", "loss.backward()", RANKS),
    ("vgs: GRPO lowers what was rewarded", "vgs.py", "m.weights[3] = -(1 if", "m.weights[3] = (1 if", f"{EQUATIONS} -k grpo"),
    ("alpha weighs GRPO", "vgs.py", "else 1 - args.alpha) * mean", "else args.alpha) * mean", f"{EQUATIONS} -k grpo"),
    ("vgs: the old policy is not held fixed", "vgs.py", "torch.where(old.isnan(), chosen.detach(), old)", "torch.where(old.isnan(), chosen, old)",
     VGS),
    ("vgs: later updates forget who sampled", "vgs.py", "if uses_rewards(args) and args.updates > 1:", "if uses_rewards(args) and args.updates > 2:",
     VGS),
    ("eta the wrong way round", "vgs.py", '"eta": norms[0] / norms[1] if usable else 1.0', '"eta": norms[1] / norms[0] if norms[0] else 1.0',
     f"{VGS} -k eta"),
    ("eta's own gradients stay", "vgs.py", "        models.student.zero_grad()\n    usable", "    usable", VGS),
    ("the log's means are over tokens", "vgs.py", "{name: mean / responses for name, mean in zip(known, means)}",
     "{name: mean / tokens for name, mean in zip(known, means)}", f"{RUNS} -k formula"),
    # ---------------------------------------------------------------------------------------------------- vold.py
    ("a resumed stage 1 counts the updates of stage 2", "vold.py", '"sft": dataclasses.replace(args, updates=1)', '"sft": args', RESUME("vold")),
    ("right answers are distilled", "vold.py", "return [not right for right in correct]", "return list(correct)", "tests/test_vold.py -k eq_6"),
    ("a group is left out only if it is all right", "vold.py", "return [not any(correct[", "return [not all(correct[", "tests/test_vold.py -k eq_6"),
    ("k1 in the place of k2", "vold.py", '"k2": lambda: difference**2 / 2', '"k2": lambda: difference', "tests/test_vold.py -k eq_3"),
    ("beta falls a step too early", "vold.py", "args.beta_decay * (step - 1)", "args.beta_decay * step", "tests/test_vold.py -k falling_beta"),
    ("beta ends at its lowest value at once", "vold.py", "return max(args.beta - ", "return min(args.beta - ", "tests/test_vold.py -k falling_beta"),
    ("vold: the old policy is not held fixed", "vold.py", "torch.where(old.isnan(), chosen.detach(), old)", "torch.where(old.isnan(), chosen, old)",
     VOLD),
    ("vold: the clips of both sides are exchanged", "vold.py", "advantage, args.clip_low, args.clip_high)  # Eq. 2",
     "advantage, args.clip_high, args.clip_low)", VOLD),
    ("masked tokens do not count in the mean", "vold.py", "m.distilled * m.known / (tokens if",
     "m.distilled * m.known / (torch.cat([x.distilled for x in micros]).sum() if", VOLD),
    ("the pieces of a tag are distilled", "vold.py", "* m.distilled * m.known / (", "* m.distilled / (", VOLD),
    ("the sequence's ratio is its mean token's", "vold.py", "common.sequence_old(now, old, 1.0, m.response)",
     "common.sequence_old(now, old, m.length, m.response)", VOLD),
    ("the teacher's softmax is over the student's tokens", "vold.py", "vocab = min(reader.processor.vocab, models.teacher.vocab)",
     "vocab = models.vocab", VOLD),
    ("the teacher's log-probs of the first response for all", "vold.py", "[start + place if place >= 0 else -1", "[place if place >= 0 else -1",
     VOLD),
    ("the teacher reads the student's chat template", "vold.py", 's.prompts["teacher"] = reader.processor.encode(question(s.row, args))',
     's.prompts["teacher"] = s.prompts["question"]', "tests/test_vold.py -k own_template"),
    ("vold: this rank's tokens are the divisor", "vold.py", "common.all_sum(torch.stack([torch.ones_like(length).sum(), (1 / length).sum()]))",
     "torch.stack([torch.ones_like(length).sum(), (1 / length).sum()])", SHAPES("vold")),
    ("measuring the shares leaves one part's weights", "vold.py",
     '    for m, whole in zip(micros, weights):\n        m.weights = whole\n    return {"grad_norm_grpo"', '    return {"grad_norm_grpo"', VOLD),
    ("stage 1 does not teach to end", "vold.py", 'processor.spell(processor.quote(trace["response"])) + [end]',
     'processor.spell(processor.quote(trace["response"]))', "tests/test_vold.py -k eq_4"),
    ("stage 1 learns from traces that were cut off", "vold.py", 'ended = [r for r in records if r["finished"]]', "ended = records",
     "tests/test_vold.py -k learnt_from"),
    ("stage 1 divides by this rank's tokens", "vold.py",
     "tokens = common.all_sum(torch.tensor(float(sum(len(m.ids) for m in micros)), device=common.device()))",
     "tokens = torch.tensor(float(sum(len(m.ids) for m in micros)), device=common.device())", "tests/test_vold.py -k eq_4"),
    # ---------------------------------------------------------------------------------------------------- ptdpo.py
    ("groups at tau are tutored", "ptdpo.py", "below = [mean < tau for mean", "below = [mean <= tau for mean", "tests/test_ptdpo.py -k routing"),
    ("the tutor corrects what was right", "ptdpo.py", "[b and not right for b, right", "[b and right for b, right", "tests/test_ptdpo.py -k routing"),
    ("the tutor is blind", "ptdpo.py", "tutored(row, args.tutor_context, args.blind_tutor)", "tutored(row, args.tutor_context, not args.blind_tutor)",
     "tests/test_ptdpo.py -k tutor_reads"),
    ("the student reads the hint", "ptdpo.py", '"""x: what the student samples under and is trained in."""\n    return ask(row)',
     '"""x: what the student samples under and is trained in."""\n    return tutored(row, "hint") or ask(row)', "tests/test_ptdpo.py -k tutor_reads"),
    ("the failed format decides who is tutored", "ptdpo.py", "route([s.correct for s in new]", "route([s.reward == 1 for s in new]",
     "tests/test_ptdpo.py -k 'dynamic or rollout'"),
    ("the reward's two weights are exchanged", "ptdpo.py", "args.group, well_formed, 0.1)", "args.group, well_formed, 0.9)",
     "tests/test_ptdpo.py -k 'dynamic or rollout'"),
    ("dapo keeps groups that are all right", "ptdpo.py", "if 0 < sum(s.correct for s in group) < args.group]\n",
     "if 0 < sum(s.correct for s in group)]\n", "tests/test_ptdpo.py -k dynamic"),
    ("dapo puts groups without an advantage last", "ptdpo.py", "for i in sorted(chosen[:wanted])", "for i in chosen[:wanted]",
     "tests/test_ptdpo.py -k dynamic"),
    ("ptdpo: the old policy is not held fixed", "ptdpo.py", "torch.where(old.isnan(), chosen.detach(), old)", "torch.where(old.isnan(), chosen, old)",
     PTDPO),
    ("ptdpo: later updates forget who sampled", "ptdpo.py", "if args.updates > 1:  # later", "if args.updates > 2:  # later", PTDPO),
    ("the tutor marks the first tokens, whoever's they are", "ptdpo.py", "args.micro_tokens, first=lambda s: s.tutored)", "args.micro_tokens)",
     PTDPO),
    ("the tutor reads the question alone", "ptdpo.py", 'prompts = [s.prompts["tutor"] for s in part]',
     'prompts = [s.prompts["question"] for s in part]', PTDPO),
    ("the reference is the student itself", "ptdpo.py", "m.reference = log_probs(models.teacher(m.batch), models.head)",
     "m.reference = models.student(m.batch, log_probs)", f"{PTDPO} -k grpo"),
    ("the reference KL drives the student away", "ptdpo.py", "m.weights[1] = args.kl * mean", "m.weights[1] = -args.kl * mean", PTDPO),
    ("the reference KL is dropped on the other groups", "ptdpo.py", "(1 - m.failing if", "(m.failing if", PTDPO),
    ("ptdpo: GRPO lowers what was rewarded", "ptdpo.py", "m.weights[0] = -mean", "m.weights[0] = mean", PTDPO),
    ("F is counted in each micro-batch", "ptdpo.py", "args.lambda_ptd / failed.clamp(min=1)", "args.lambda_ptd / max(tutored_tokens(m), 1)", PTDPO),
    ("the two means are exchanged", "ptdpo.py", 'if args.average == "token" else', 'if args.average != "token" else', PTDPO),
    ("gspo's ratio is not divided by the length", "ptdpo.py", "common.sequence_old(now, old, m.length, m.response)",
     "common.sequence_old(now, old, 1.0, m.response)", PTDPO),
    ("ptdpo: this rank's tokens are the divisors", "ptdpo.py", "tokens, responses, failed = common.all_sum(counts)",
     "tokens, responses, failed = counts", SHAPES("ptdpo")),
    # ---------------------------------------------------------------------------------------------------- vigos.py
    ("the description ends a token late", "vigos.py", "if start <= close)), (first,", "if start <= close) + 1), (first,",
     "tests/test_vigos.py -k spans"),
    ("the opening tag is part of the reasoning", "vigos.py", "if start >= inside)", "if start >= think)", "tests/test_vigos.py -k spans"),
    ("the closing brace of the box is left out", "vigos.py", "if start > last)))", "if start >= last)))", "tests/test_vigos.py -k spans"),
    ("reverse for forward KL", "vigos.py", "limited(shares_of(log_q, log_p), args)  # Eq. 14", "limited(shares_of(log_p, log_q), args)  # Eq. 14",
     f"{VIGOS} -k vigos"),
    ("forward for reverse KL", "vigos.py", "limited(shares_of(log_p, log_q), args)  # Eq. 16", "limited(shares_of(log_q, log_p), args)  # Eq. 16",
     f"{VIGOS} -k vigos"),
    ("a token's KL is at least the clip", "vigos.py", "return total.clamp(max=args.clip)", "return total.clamp(min=args.clip)",
     "tests/test_vigos.py -k clipped_token"),
    ("a token's KL is clipped by entries", "vigos.py", "    if args.clip_entries:", "    if not args.clip_entries:",
     "tests/test_vigos.py -k clipped_token"),
    ("the weights of perception and reasoning are exchanged", "vigos.py", "torch.tensor([args.weight_perception, args.weight_reasoning,",
     "torch.tensor([args.weight_reasoning, args.weight_perception,", VIGOS),
    ("the perception teacher knows the reference", "vigos.py", 'return ask(row, "")',
     "return ask(row, f\"Reference solution: {common.one_answer(row['reference'])}\")", "tests/test_vigos.py -k sees_what"),
    ("the perception teacher reads the question", "vigos.py", 'return ask(row, "")', 'return ask(row, row["problem"])',
     "tests/test_vigos.py -k sees_what"),
    ("the student knows the reference", "vigos.py", 'return {"question": question, "perception"', 'return {"question": privileged, "perception"',
     "tests/test_vigos.py -k sees_what"),
    ("the student marks itself", "vigos.py", "hidden = models.teacher(models.processor.batch(prompts or",
     "hidden = models.student(models.processor.batch(prompts or", VIGOS),
    ("marks of the first response for all", "vigos.py", "to += [start + t for t in tokens]", "to += [t for t in tokens]", VIGOS),
    ("marks of the first teacher for all", "vigos.py", "places += [row + t - skipped for t in tokens]", "places += [t - skipped for t in tokens]",
     VIGOS),
    ("answers out of form get the forward KL", "vigos.py", '& (args.method == "vigos" and args.fallback == "reverse_kl")',
     '& (args.fallback == "forward_kl")', VIGOS),
    ("vigos: this rank's tokens are the divisors", "vigos.py", "counts = common.all_sum(torch.stack([(part == i).sum() for i in range(3)]).float())",
     "counts = torch.stack([(part == i).sum() for i in range(3)]).float()", SHAPES("vigos")),
    ("wrong answers are added up, not averaged", "vigos.py", "wrong.logsumexp(0) + math.log(len(wrong))", "wrong.logsumexp(0)",
     "tests/test_vigos.py -k leakage_by_hand"),
    # ---------------------------------------------------------------------------------------------------- reopold.py
    ("the floor is a ceiling", "reopold.py", "return reward.clamp(min=lowest_reward(args.lam))", "return reward.clamp(max=lowest_reward(args.lam))",
     "tests/test_reopold.py -k floor"),
    ("lambda's two places in the floor are exchanged", "reopold.py", "return math.log(lam) / (1 - lam)", "return math.log(1 - lam) / lam",
     "tests/test_reopold.py -k floor"),
    ("gradient flows through the reward", "reopold.py", "(log_p.detach() if args.stop_gradient else log_p)", "log_p",
     "tests/test_reopold.py -k stop_gradient"),
    ("the reward the wrong way round", "reopold.py", "reward = log_q - (log_p.detach() if args.stop_gradient else log_p)",
     "reward = (log_p.detach() if args.stop_gradient else log_p) - log_q", "tests/test_reopold.py -k floor"),
    ("the share beta is left out, not kept", "reopold.py", "torch.tensor([1 - args.beta])", "torch.tensor([args.beta])",
     "tests/test_reopold.py -k refinement"),
    ("the surest tokens are kept", "reopold.py", "return [m.entropy >= tau for m in micros]", "return [m.entropy <= tau for m in micros]",
     "tests/test_reopold.py -k refinement"),
    ("the token at the threshold is left out", "reopold.py", "return [m.entropy >= tau for m in micros]", "return [m.entropy > tau for m in micros]",
     "tests/test_reopold.py -k refinement"),
    ("the phases are exchanged", "reopold.py", "progress < args.switch", "progress >= args.switch", "tests/test_reopold.py -k switch"),
    ("the switch comes a step early", "reopold.py", "weigh(micros, args, (step - 1) / steps)", "weigh(micros, args, step / steps)",
     "tests/test_reopold.py -k 'real_runs and updates'"),
    ("exploration keeps what the teacher dislikes", "reopold.py", "m.log_q - m.old >= lowest_reward(args.lam)",
     "m.old - m.log_q >= lowest_reward(args.lam)", "tests/test_reopold.py -k exploration"),
    ("the importance ratio the wrong way round", "reopold.py", "common.clipped_surrogate(chosen, old, gain,",
     "common.clipped_surrogate(old, chosen, gain,", "tests/test_reopold.py -k pessimistically"),
    ("the objective is minimised", "reopold.py", "m.weights[0] = -mask.float() / count", "m.weights[0] = mask.float() / count", REOPOLD),
    ("the mean is over all tokens, kept or not", "reopold.py", "torch.stack([mask.sum() for mask in masks]).sum()",
     "torch.tensor(sum(mask.numel() for mask in masks))", REOPOLD),
    ("reopold: this rank's tokens are the divisor", "reopold.py", "count = common.all_sum(torch.stack([mask.sum() for mask in masks]).sum())",
     "count = torch.stack([mask.sum() for mask in masks]).sum()", SHAPES("reopold")),
    ("reopold: the gradient is the mean over the ranks", "reopold.py", "(loss * common.world_size()).backward()", "loss.backward()",
     SHAPES("reopold")),
    ("reopold: the old policy is not held fixed", "reopold.py", "torch.where(old.isnan(), chosen.detach(), old)",
     "torch.where(old.isnan(), chosen, old)", REOPOLD),
    ("lambda is the teacher's share of the mixture", "reopold.py", "log_p + math.log(args.lam), teacher[0].log_softmax(-1) + math.log(1 - args.lam)",
     "log_p + math.log(1 - args.lam), teacher[0].log_softmax(-1) + math.log(args.lam)", REOPOLD),
    ("gkd has the forward KL", "reopold.py", "objective = -common.kl(log_p, teacher[0].log_softmax(-1))",
     "objective = -common.kl(teacher[0].log_softmax(-1), log_p)", REOPOLD),
    ("the schedule counts steps for updates", "reopold.py", "models = common.load_models(args, processor, teacher, steps * args.updates)",
     "models = common.load_models(args, processor, teacher, steps)", "tests/test_reopold.py -k 'real_runs and updates'"),
    ("no tools are offered", "reopold.py", '{"question": with_tools if args.calls else question}, args)', '{"question": question}, args)',
     f"{TOOLS} -k 'offered or real_runs'"),
    ("the sampler stays the initial student", "reopold.py",
     '            models.engine.sync(models.student.weights())\n            progress.phase("sync")', '            progress.phase("sync")',
     RESUME("reopold")),
]


def check(faults: list[tuple]) -> None:
    """Stop at a fault whose text is not there exactly once: the code has changed, and the fault has to be changed with it."""
    names = [name for name, *_ in faults]
    for name, file, old, new, _ in faults:
        found = (ROOT / file).read_text().count(old)
        if found != 1:
            sys.exit(f"{name!r}: its text occurs {found} times in {file}, and has to occur once: {old}")
        if old == new or names.count(name) != 1:
            sys.exit(f"{name!r} changes nothing, or is not the only fault of this name")


def copy_to(folder: str) -> None:
    """What git tracks, and tests that it does not track yet."""
    for more in (["--cached"], ["--others", "--exclude-standard", "tests"]):
        listed = subprocess.run(["git", "ls-files", "-z", *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder, name))


def pytest(folder: str, tests: list[str], timeout: int) -> tuple[int | None, str]:
    """pytest's exit code (None: not done in time), and what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said = process.communicate(timeout=timeout)[0]
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun, too: it ends its ranks, which are in groups of their own
        time.sleep(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def examine(fault: tuple) -> tuple[str, float, str]:
    """(caught, survived or broken; seconds; the test that failed, or the last line that was printed)."""
    name, file, old, new, tests = fault
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy_to(folder)
        path = Path(folder, file)
        path.write_text(path.read_text().replace(old, new))
        code, said = pytest(folder, shlex.split(tests), TIMEOUT)
    verdict, seconds = {0: "survived", 1: "caught"}.get(code, "broken"), time.perf_counter() - started
    by = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(.*)", said, re.M) if code == 1 else []
    print(f"{verdict:9}{seconds:5.0f} s  {name}", file=sys.stderr, flush=True)
    return verdict, seconds, by[0] if by else "no end in time" if code is None else (said.strip().splitlines() or [""])[-1]


def unchanged(faults: list[tuple]) -> None:
    """Stop unless all selected tests pass without a fault; one run a file."""
    selected: dict[str, set] = {}
    for *_, tests in faults:
        file, *rest = shlex.split(tests)
        selected.setdefault(file, set()).add(f"({rest[1]})" if rest else "")
    with tempfile.TemporaryDirectory() as folder:
        copy_to(folder)
        for file, some in selected.items():
            code, said = pytest(folder, [file] if "" in some else [file, "-k", " or ".join(sorted(some))], 4 * TIMEOUT)
            if code != 0:
                sys.exit(f"{said}\n{file} does not pass without a fault: mend that first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="faults whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    args = parser.parse_args()
    check(FAULTS)
    faults = [fault for fault in FAULTS if any(part in fault[0] for part in args.only)]
    if args.list or not faults:
        print("\n".join(f"{file:12}{name}" for name, file, *_ in faults) or "no fault has such a name")
        return
    unchanged(faults)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(examine, faults))
    print(f"\n{'verdict':10}{'s':>4}  {'file':12}{'fault':60}found by")
    for (name, file, *_), (verdict, seconds, by) in zip(faults, results):
        print(f"{verdict:10}{seconds:4.0f}  {file:12}{name:60}{by[:100]}")
    missed = [name for (name, *_), (verdict, *_) in zip(faults, results) if verdict != "caught"]
    print(f"\n{len(faults) - len(missed)} of {len(faults)} caught" + "".join(f"\n  not caught: {name}" for name in missed))
    sys.exit(len(missed) > 0.05 * len(faults))


if __name__ == "__main__":
    main()
