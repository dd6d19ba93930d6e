/* Log-probs, PPO's loss, gradients and advantages of known numbers through the C API. */
#include <math.h>
#include <string.h>

#include "expect.h"
#include "mem1/mem1.h"

/* Three rows of three logits, one float between them. With the bias (0, ln 2, 0) the softmax of the first two is
 * (1/8, 1/4, 5/8), the second at temperature 1/2; the third has nothing but -inf. */
enum { ROWS = 3, VOCABULARY = 3, STRIDE = 4 };
#define LN2 0.6931471805599453f
#define LN5 1.6094379124341003f
#define ENTROPY 0.9002560513
static const float kLogits[ROWS * STRIDE] = {0,       0,  LN5,       77,        0,         -LN2 / 2,
                                             LN5 / 2, 77, -INFINITY, -INFINITY, -INFINITY, 77};
static const float kBias[VOCABULARY] = {0, LN2, 0}, kTemperature[ROWS] = {1, 0.5f, 1};
static const int64_t kTarget[ROWS] = {1, 2, 0}, kBadTarget[ROWS] = {1, VOCABULARY, 0}, kNegative[ROWS] = {1, 2, -1};

/* All that a call may write. */
typedef struct arrays {
  float logits[ROWS * STRIDE];
  float logprob[ROWS], entropy[ROWS], max_logit[ROWS], log_sum_exp[ROWS], loss[ROWS], kl[ROWS], ratio[ROWS],
      clipped[ROWS];
} arrays;

static mem1_logit_rows_params describe(arrays* a, mem1_rows_task task) {
  mem1_logit_rows_params p;
  memset(&p, 0, sizeof(p));
  p.struct_size = sizeof(p);
  p.device = MEM1_CPU;
  p.task = task;
  p.dtype = p.gradient_dtype = MEM1_FLOAT32;
  p.rows = ROWS;
  p.vocabulary = VOCABULARY;
  p.logits = a->logits;
  p.stride_row = STRIDE;
  p.bias = kBias;
  p.target = kTarget;
  p.temperature = kTemperature;
  p.logprob = a->logprob;
  p.entropy = a->entropy;
  p.max_logit = a->max_logit;
  p.log_sum_exp = a->log_sum_exp;
  return p;
}

static void fill(arrays* a) {
  memset(a, 0, sizeof(*a));
  memcpy(a->logits, kLogits, sizeof(kLogits));
}

static int row_is(const float* row, double first, double second, double third) {
  return near(row[0], first) && near(row[1], second) && near(row[2], third) && row[3] == 77;
}

/* The call is refused, and says why in words that begin with `name`. */
static int refused(const mem1_logit_rows_params* p, const char* name) {
  mem1_error error = {""};
  if (mem1_logit_rows(p, NULL, NULL) != MEM1_INVALID_ARGUMENT) return 0; /* nobody wants to know why */
  return mem1_logit_rows(p, NULL, &error) == MEM1_INVALID_ARGUMENT && strstr(error.message, name) == error.message;
}

#define REFUSED(name, change)        \
  do {                               \
    mem1_logit_rows_params p = good; \
    change;                          \
    EXPECT(refused(&p, name));       \
  } while (0)

static int logprobs_and_their_gradient(void) {
  const float d_logprob[ROWS] = {2, 0, 1}, d_entropy[ROWS] = {0, 1, 1};
  mem1_error error;
  arrays a, before;
  fill(&a);
  mem1_logit_rows_params good = describe(&a, MEM1_ROWS_LOGPROB);
  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK);
  EXPECT(near(a.logprob[0], -1.3862943611) && near(a.logprob[1], -0.4700036292) && a.logprob[2] == -INFINITY);
  EXPECT(near(a.entropy[0], ENTROPY) && near(a.entropy[1], ENTROPY) && a.entropy[2] == 0);
  EXPECT(near(a.max_logit[0], LN5) && near(a.max_logit[1], LN5 / 2) && a.max_logit[2] == -INFINITY);
  EXPECT(near(a.log_sum_exp[0], 0.4700036292) && near(a.log_sum_exp[1], 0.4700036292) && a.log_sum_exp[2] == 0);
  EXPECT(memcmp(a.logits, kLogits, sizeof(kLogits)) == 0);

  before = a;
  EXPECT(refused(NULL, "params"));
  REFUSED("struct_size", p.struct_size -= 8);
  REFUSED("device", p.device = (mem1_device)7);
  REFUSED("task", p.task = (mem1_rows_task)3);
  REFUSED("dtype", p.dtype = p.gradient_dtype = MEM1_BFLOAT16);
  REFUSED("gradient_dtype", p.gradient_dtype = MEM1_FLOAT16); /* CUDA has it */
  REFUSED("with_gradient", p.with_gradient = 2);
  REFUSED("rows", p.rows = -1);
  REFUSED("rows", p.rows = (int64_t)1 << 31);
  REFUSED("vocabulary", p.vocabulary = 0);
  REFUSED("stride_row", p.stride_row = VOCABULARY - 1);
  REFUSED("logits", p.logits = NULL);
  REFUSED("logits, target", p.target = NULL);
  REFUSED("logits, target, temperature", p.temperature = NULL);
  REFUSED("target[1]: expected 0 to 2, got 3", p.target = kBadTarget);
  REFUSED("target[2]: expected 0 to 2, got -1", p.target = kNegative);
  REFUSED("entropy", p.entropy = NULL);
  REFUSED("logprob", p.logprob = NULL);
  REFUSED("max_logit", p.max_logit = NULL);
  REFUSED("max_logit, log_sum_exp", p.log_sum_exp = NULL);
  REFUSED("d_logprob", p.task = MEM1_ROWS_BACKWARD);
  EXPECT(memcmp(&a, &before, sizeof(a)) == 0);

  good.task = MEM1_ROWS_BACKWARD;
  good.d_logprob = d_logprob;
  good.d_entropy = d_entropy;
  good.logprob = NULL;
  REFUSED("d_logprob, d_entropy", p.d_entropy = NULL);
  EXPECT(memcmp(&a, &before, sizeof(a)) == 0);
  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK);
  EXPECT(row_is(a.logits, -0.25, 1.5, -1.25));
  EXPECT(row_is(a.logits + STRIDE, 0.2947963726, 0.2430191549, -0.5378155276));
  EXPECT(row_is(a.logits + 2 * STRIDE, 0, 0, 0));

  /* No rows: done at once. */
  memset(&good, 0, sizeof(good));
  good.struct_size = sizeof(good);
  good.vocabulary = VOCABULARY;
  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK);
  return 0;
}

static int ppo_loss(void) {
  /* Ratios 1.5 (clipped), 4 (dual clip) and e^-20 (bounded); sampler weights 3 (cap 2), 1 and 1; d 1, 0 and -20. */
  const float old[ROWS] = {-1.7917594692f, -1.8562979903f, -1}, advantage[ROWS] = {2, -1, 0};
  const float ref[ROWS] = {-2.3862943611f, -0.4700036292f, -1}, sampler[ROWS] = {-2.8903717579f, -1.8562979903f, -1};
  const float scale[ROWS] = {0.25f, 1, 1};
  mem1_error error;
  arrays a, before;
  fill(&a);
  before = a;
  mem1_logit_rows_params good = describe(&a, MEM1_ROWS_PPO_LOSS);
  good.max_logit = good.log_sum_exp = NULL;
  good.old_logprob = old;
  good.advantage = advantage;
  good.ref_logprob = ref;
  good.rollout_logprob = sampler;
  good.scale = scale;
  good.clip_low = good.clip_high = 0.2;
  good.dual_clip = 3;
  good.rollout_is_cap = 2;
  good.kl_coef = 0.5;
  good.kl_estimator = MEM1_KL_K1;
  good.entropy_coef = 0.1;
  good.loss = a.loss;
  good.kl = a.kl;
  good.ratio = a.ratio;
  good.clipped = a.clipped;

  REFUSED("old_logprob", p.old_logprob = NULL);
  REFUSED("old_logprob, advantage", p.advantage = NULL);
  REFUSED("old_logprob, advantage, scale", p.scale = NULL);
  REFUSED("loss", p.loss = NULL);
  REFUSED("loss, ratio", p.ratio = NULL);
  REFUSED("loss, ratio, clipped", p.clipped = NULL);
  REFUSED("ref_logprob, kl", p.kl = NULL);
  REFUSED("ref_logprob, kl", p.ref_logprob = NULL);
  REFUSED("ref_logprob: expected a pointer for kl_coef = 0.5", p.ref_logprob = p.kl = NULL);
  REFUSED("kl_estimator", p.kl_estimator = (mem1_kl_estimator)0);
  REFUSED("clip_low", p.clip_low = -0.1);
  REFUSED("clip_low", p.clip_low = 1.1);
  REFUSED("clip_low, clip_high", p.clip_high = NAN);
  REFUSED("dual_clip: expected 0 for none, or > 1, got 1", p.dual_clip = 1);
  REFUSED("dual_clip", p.dual_clip = NAN);
  REFUSED("rollout_is_cap", p.rollout_is_cap = 0);
  REFUSED("target[1]", p.target = kBadTarget);
  EXPECT(memcmp(&a, &before, sizeof(a)) == 0);

  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK);
  EXPECT(memcmp(a.logits, kLogits, sizeof(kLogits)) == 0); /* no gradient was asked for */
  EXPECT(near(a.logprob[0], -1.3862943611) && a.logprob[2] == -INFINITY && near(a.entropy[1], ENTROPY));
  EXPECT(near(a.ratio[0], 1.5) && near(a.ratio[1], 4) && near(a.ratio[2] * 1e9, 2.061153622));
  EXPECT(a.clipped[0] == 1 && a.clipped[1] == 0 && a.clipped[2] == 0);
  EXPECT(near(a.kl[0], 1) && near(a.kl[1], 0) && near(a.kl[2], -20));
  EXPECT(near(a.loss[0], -1.0975064013) && near(a.loss[1], 2.9099743949) && near(a.loss[2], -10));

  good.with_gradient = 1;
  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK);
  EXPECT(row_is(a.logits, -0.0193099547, 0.0907122606, -0.0714023059));
  EXPECT(row_is(a.logits + STRIDE, -0.1544796373, -0.2743019155, 0.4287815528));
  EXPECT(row_is(a.logits + 2 * STRIDE, 0, 0, 0));

  /* The other estimators of d = 1, without the rest; then without kl at all. */
  good.rollout_logprob = NULL;
  good.entropy_coef = good.dual_clip = good.kl_coef = 0;
  good.kl_estimator = MEM1_KL_K2;
  good.rows = 1;
  fill(&a);
  good.with_gradient = 0;
  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK);
  EXPECT(near(a.kl[0], 0.5) && near(a.loss[0], -0.6) && a.loss[1] == 0);
  good.kl_estimator = MEM1_KL_K3;
  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK);
  EXPECT(near(a.kl[0], 0.3678794412) && near(a.loss[0], -0.6));
  a.kl[0] = 55;
  good.ref_logprob = good.kl = NULL;
  EXPECT(mem1_logit_rows(&good, NULL, &error) == MEM1_OK && a.kl[0] == 55 && near(a.loss[0], -0.6));
  return 0;
}

static int advantages(void) {
  /* Of five tokens the policy wrote the first, third and last; what the others hold is not used. */
  const float reward[5] = {0, NAN, 0, 9, 1}, value[5] = {1, 9, 2, INFINITY, 3};
  const float want_advantage[5] = {-0.25f, 0, -1, 0, -2}, want_returns[5] = {0.75f, 0, 1, 0, 1};
  const double wide_reward[2] = {4, 0}, wide_value[2] = {1, 8};
  const uint8_t mask[5] = {1, 0, 255, 0, 1};
  float advantage[5] = {7, 7, 7, 7, 7}, returns[5] = {7, 7, 7, 7, 7};
  double wide_advantage[2], wide_returns[2];
  mem1_error error;
  mem1_gae_params good, p;
  memset(&good, 0, sizeof(good));
  good.struct_size = sizeof(good);
  good.device = MEM1_CPU;
  good.dtype = MEM1_FLOAT32;
  good.batch = 1;
  good.length = 5;
  good.reward = reward;
  good.value = value;
  good.mask = mask;
  good.gamma = good.lambda = 0.5;
  good.advantage = advantage;
  good.returns = returns;

#define GAE_REFUSED(name, change)                                \
  do {                                                           \
    p = good;                                                    \
    change;                                                      \
    EXPECT(mem1_gae(&p, NULL, &error) == MEM1_INVALID_ARGUMENT); \
    EXPECT(strstr(error.message, name) == error.message);        \
  } while (0)
  EXPECT(mem1_gae(NULL, NULL, &error) == MEM1_INVALID_ARGUMENT && strstr(error.message, "params") == error.message);
  GAE_REFUSED("struct_size", p.struct_size += 8);
  GAE_REFUSED("device", p.device = (mem1_device)-1);
  GAE_REFUSED("dtype", p.dtype = MEM1_FLOAT16);
  GAE_REFUSED("batch", p.batch = -1);
  GAE_REFUSED("batch, length", p.length = -1);
  GAE_REFUSED("gamma", p.gamma = NAN);
  GAE_REFUSED("gamma, lambda", p.lambda = INFINITY);
  GAE_REFUSED("reward", p.reward = NULL);
  GAE_REFUSED("reward, value", p.value = NULL);
  GAE_REFUSED("reward, value, mask", p.mask = NULL);
  GAE_REFUSED("advantage", p.advantage = NULL);
  GAE_REFUSED("advantage, returns", p.returns = NULL);
  for (int t = 0; t < 5; ++t) EXPECT(advantage[t] == 7 && returns[t] == 7);

  EXPECT(mem1_gae(&good, NULL, &error) == MEM1_OK);
  for (int t = 0; t < 5; ++t) EXPECT(advantage[t] == want_advantage[t] && returns[t] == want_returns[t]);

  /* Two rows of one token in fp64; the second has no step. */
  good.dtype = MEM1_FLOAT64;
  good.batch = 2;
  good.length = 1;
  good.reward = wide_reward;
  good.value = wide_value;
  good.advantage = wide_advantage;
  good.returns = wide_returns;
  EXPECT(mem1_gae(&good, NULL, &error) == MEM1_OK);
  EXPECT(wide_advantage[0] == 3 && wide_returns[0] == 4 && wide_advantage[1] == 0 && wide_returns[1] == 0);
  good.batch = 0;
  good.reward = NULL;
  EXPECT(mem1_gae(&good, NULL, &error) == MEM1_OK);
  return 0;
}

int losses(void) { return logprobs_and_their_gradient() != 0 || ppo_loss() != 0 || advantages() != 0; }
