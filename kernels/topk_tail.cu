// The Top-K-plus-tail divergence and its gradient over a large vocabulary. What it computes is defined in reference.py.
//
//   student p = softmax(z), teacher q = softmax(y), S = TopK(p) u TopK(q)
//   p_t and q_t = the mass outside S, buckets b = S and the tail
//   dD/dz_u = p_u (a_b(u) - abar),   a_b = dD/dp_b,   abar = sum_b p_b a_b
//
// Outside S the bracket is one number a row: a softmax times a scalar, and at most 2K entries that differ. Hence three
// kernels:
//
//   row_stats   one CTA a row, student and teacher alike: one read for the softmax and the exact top K, and about K of
//               the row's 4096 groups a second time
//   row_loss    one CTA a row: the union, D, the scalar and the <= 2K entries, in float64
//   row_grad    one CTA a row: one read and one write (in place if asked)
//
// Precision. Exponentials of the vocabulary are float32, added in float32 within a group and in float64 beyond it. The
// mass outside the top K is summed over the tokens outside it, never taken as one minus the others, so that it is right
// to 1e-6 also where p_max = 1 - 1e-8; the log-sum-exp is then that mass plus the top K, added in float64. Whatever
// touches only S (<= 2K terms a row) is float64 altogether, and each bucket's share of D is written so that it is never
// negative and errors of the masses enter it in second order only. Denormals count as zero (-ftz=true), and where that
// would lose a tail, it is summed again in float64.
//
// Order. Equal logits rank by index, the smaller first. No floating-point atomics: two runs agree bit for bit.
//
// The same file compiles with g++ against a small header that plays threads and barriers on a CPU. For its sake global
// memory is Global<T>, shared memory is SHARED(...), and a run of elements is taken by span(): plain pointers for nvcc,
// checked ones there.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
template <class T> using Global = T*;
template <class T> using Shared = T*;
template <class T> __host__ __device__ __forceinline__ T* span(T* p, int64_t first, int) { return p + first; }
template <class T> Global<T> global(T* p, int64_t) { return p; }
#define SHARED(T, name, n) __shared__ T name[n]
#define LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define LAUNCH_STATUS() (int)cudaGetLastError()
#define STATUS_TEXT(status) cudaGetErrorString((cudaError_t)(status))
#else
#include "cuda_on_cpu.h"
#endif
#include <float.h>

constexpr int THREADS = 512;      // of row_stats and row_grad
constexpr int GROUPS = 8;         // groups a thread: a row is 4096 groups, each with a maximum and a sum of its own
constexpr int BATCH = 4;          // 16-byte loads in flight a thread
constexpr int LIST = 4096;        // candidates that fit into shared memory; more of them: select_from_row
constexpr int MAX_K = 1024;       // MAX_K <= THREADS * GROUPS and 2 * MAX_K <= LIST
constexpr int LOSS_THREADS = 128; // of row_loss
constexpr float LOG2E = 1.44269504088896340736f;

enum Kind { JSD, FORWARD_KL, REVERSE_KL };
enum Outside { TAIL, RENORMALISED, RAW };
enum Stat { ROW_MAX, LOG_Z, LOW, KTH_VALUE, KTH_INDEX, STATS };        // one row of row_stats' output
enum Dense { D_MAX, D_LOG_SCALE, D_SIGN, DENSE };                      // what row_grad needs outside S
enum Metric { STUDENT_TAIL, TEACHER_TAIL, OVERLAP, GAP_BOUND, TAIL_FLOORED, BAD, METRICS };

// ------------------------------------------------------------------------------------------------- reading and writing
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void unpack(uint4 raw, float (&x)[4]) {
    const unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __uint_as_float(word[i]);
}
__device__ __forceinline__ void unpack(uint4 raw, float (&x)[8]) {  // a bfloat16 is the upper half of a float32
    const unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(word[i] << 16);
        x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ uint4 pack(const float (&x)[4]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
    const unsigned first = __bfloat16_as_ushort(__float2bfloat16(low));
    const unsigned second = __bfloat16_as_ushort(__float2bfloat16(high));
    return first | second << 16;
}
__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return {pack_pair(x[0], x[1]), pack_pair(x[2], x[3]), pack_pair(x[4], x[5]), pack_pair(x[6], x[7])};
}
__device__ __forceinline__ void unpack(float raw, float (&x)[1]) { x[0] = raw; }
__device__ __forceinline__ void unpack(__nv_bfloat16 raw, float (&x)[1]) { x[0] = to_float(raw); }
// A unit is W consecutive elements: 16 bytes where rows are aligned to them, else one element.
template <int W, class T> __device__ __forceinline__ auto load(Global<const T> row, int64_t unit) {
    if constexpr (W == 1) return row[unit];
    else return __ldcs(reinterpret_cast<const uint4*>(span(row, unit * W, W)));
}
__device__ __forceinline__ void store_one(float x, Global<float> row, int64_t i) { row[i] = x; }
__device__ __forceinline__ void store_one(float x, Global<__nv_bfloat16> row, int64_t i) {
    row[i] = __float2bfloat16(x);
}
template <int W, class T> __device__ __forceinline__ void store(const float (&x)[W], Global<T> row, int64_t unit) {
    if constexpr (W == 1) store_one(x[0], row, unit);
    else __stcs(reinterpret_cast<uint4*>(span(row, unit * W, W)), pack(x));
}

// Group r of thread t holds the units r * THREADS + t + j * THREADS * GROUPS; the last valid % W elements, which make
// no unit, belong to group 0 of the first threads. body(index of the first, values) is called for every unit of the
// group, and for such an element.
template <int W, class T, class Body> __device__ void visit_group(Global<const T> row, int valid, int r, Body body) {
    const int t = threadIdx.x;
    const int units = valid / W;
    for (int unit = r * THREADS + t; unit < units; unit += THREADS * GROUPS) {
        float x[W];
        unpack(load<W>(row, unit), x);
        body(unit * W, x);
    }
    if (r == 0 && t < valid % W) {
        const float x[1] = {to_float(row[units * W + t])};
        body(units * W + t, x);
    }
}
template <int W> __device__ void group_of(int index, int valid, int& thread, int& r) {
    const int unit = index / W;
    thread = unit < valid / W ? unit % THREADS : index % W;
    r = unit < valid / W ? unit / THREADS % GROUPS : 0;
}

// ---------------------------------------------------------------------------------------------------------- reductions
// Every thread gets the sum, added in the same order by all. scratch (one entry a warp) is used by this call alone.
__device__ __forceinline__ double block_sum(double x, Shared<double> scratch) {
    const int t = threadIdx.x;
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
    if (t % 32 == 0) scratch[t / 32] = x;
    __syncthreads();
    x = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) x += scratch[w];
    return x;
}
__device__ __forceinline__ float block_max(float x, Shared<float> scratch) {
    const int t = threadIdx.x;
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
    if (t % 32 == 0) scratch[t / 32] = x;
    __syncthreads();
    x = -INFINITY;
    for (unsigned w = 0; w < blockDim.x / 32; w++) x = fmaxf(x, scratch[w]);
    return x;
}

// --------------------------------------------------------------------------------------------------------- the softmax
// -inf is a legal logit: the reference is finite, so that exp(-inf - reference) = 0 and never NaN. NaN and +inf make
// the sum NaN.
__device__ __forceinline__ float finite(float peak) { return fmaxf(peak, -FLT_MAX); }

template <int W> __device__ __forceinline__ void accumulate(const float (&x)[W], float& peak, float& sum) {
    float top = peak;
#pragma unroll
    for (int i = 0; i < W; i++) top = fmaxf(top, x[i]);
    sum *= __expf(finite(peak) - finite(top));
#pragma unroll
    for (int i = 0; i < W; i++) sum += __expf(x[i] - finite(top));
    peak = top;
}

// ----------------------------------------------------------------------------------------------------- selecting top K
// A key orders elements by (value descending, index ascending) as one unsigned number; no two elements of a row have
// the same. Keys of a list of indices have no value; the index -1 then has the key 0, the smallest.
__device__ __forceinline__ uint64_t index_key(int index) { return 0xffffffffu - (unsigned)index; }
__device__ __forceinline__ uint64_t make_key(float value, int index) {
    const unsigned bits = __float_as_uint(value == 0.0f ? 0.0f : value);  // -0 equals 0, as it does in ranks()
    return (uint64_t)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | index_key(index);
}
__device__ __forceinline__ float key_value(uint64_t key) {
    const unsigned bits = (unsigned)(key >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ int key_index(uint64_t key) { return (int)(0xffffffffu - (unsigned)key); }

__device__ __forceinline__ float sign_of(double x) { return isnan(x) ? NAN : (x > 0) - (x < 0); }

// The largest number n whose bits below `last` are 0 such that at least `need` keys are >= n: a radix select, one byte
// a pass, the highest first. visit(f) calls f(key) for each key of this thread. With last = 0, n is the need-th largest
// key itself.
template <class Visit>
__device__ uint64_t radix_select(int need, int last, Shared<int> histogram, Shared<int> found, Visit visit) {
    const int t = threadIdx.x;
    uint64_t chosen = 0;
    for (int shift = 56; shift >= last; shift -= 8) {
        if (t < 256) histogram[t] = 0;
        __syncthreads();
        visit([&](uint64_t key) {
            if (shift == 56 || key >> (shift + 8) == chosen >> (shift + 8))
                atomicAdd(histogram + (int)(key >> shift & 255), 1);
        });
        __syncthreads();
        if (t < 32) {  // one lane holds the byte where the count from above reaches `need`
            int own = 0;
            for (int i = 0; i < 8; i++) own += histogram[8 * t + i];
            int above = own;
            for (int o = 1; o < 32; o *= 2) {
                const int other = __shfl_down_sync(~0u, above, o);
                if (t + o < 32) above += other;
            }
            above -= own;
            if (above < need && above + own >= need) {
                int byte = 8 * t + 7;
                for (; above + histogram[byte] < need; byte--) above += histogram[byte];
                found[0] = byte;
                found[1] = need - above;
            }
        }
        __syncthreads();
        chosen |= (uint64_t)found[0] << shift;
        need = found[1];
    }
    return chosen;
}

// Sorts list[0 .. count) in descending order; list must have room for the next power of two.
__device__ void sort_descending(Shared<uint64_t> list, int count) {
    const int t = threadIdx.x;
    int n = 2;
    while (n < count) n *= 2;
    for (int i = count + t; i < n; i += THREADS) list[i] = 0;
    __syncthreads();
    for (int size = 2; size <= n; size *= 2) {
        for (int stride = size / 2; stride; stride /= 2) {
            for (int i = t; i < n / 2; i += THREADS) {
                const int a = 2 * i - (i & (stride - 1)), b = a + stride;
                const uint64_t first = list[a], second = list[b];
                if ((first < second) == ((a & size) == 0)) {
                    list[a] = second;
                    list[b] = first;
                }
            }
            __syncthreads();
        }
    }
}
__device__ bool contains(Shared<uint64_t> list, int count, uint64_t key) {  // list in descending order
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (list[middle] > key) low = middle + 1;
        else high = middle;
    }
    return low < count && list[low] == key;
}
// Is it among the top K?
__device__ __forceinline__ bool ranks(float value, int index, double kth_value, double kth_index) {
    return value > kth_value || (value == kth_value && index <= kth_index);
}

// ------------------------------------------------------------------------------------------------- kernel 1: row_stats
// Writes STATS numbers a row: its maximum, log sum exp(x - maximum), the share LOW of the mass that lies outside the K
// winners, and the last winner, which decides membership of any other token. SELECT: the winners are the top K, written
// to top [N, K] in descending order. Otherwise they are the tokens listed in given [N, K], -1 where there are fewer.
template <class T, int W, bool SELECT>
__global__ void __launch_bounds__(THREADS, 2)
row_stats(Global<const T> logits, int64_t row_stride, int valid, int k, Global<const int> given, Global<int> top,
          Global<double> stats) {
    SHARED(uint64_t, list, LIST);
    SHARED(int, histogram, 256);
    SHARED(int, found, 2);
    SHARED(int, listed, 1);
    SHARED(int, marks, THREADS);
    SHARED(float, peaks, THREADS / 32);
    SHARED(double, totals, THREADS / 32);
    SHARED(double, highs, THREADS / 32);
    SHARED(double, lows, THREADS / 32);
    SHARED(double, again, THREADS / 32);
    const int t = threadIdx.x;
    const int64_t n = blockIdx.x;
    const Global<const T> row = logits + n * row_stride;
    const int units = valid / W;

    // One read: a maximum and a sum of exponentials a group, the sum relative to the maximum.
    float peak[GROUPS], sum[GROUPS];
#pragma unroll
    for (int r = 0; r < GROUPS; r++) peak[r] = -INFINITY, sum[r] = 0;
    for (int tile = 0; tile < units; tile += THREADS * GROUPS) {
#pragma unroll
        for (int first = 0; first < GROUPS; first += BATCH) {
            decltype(load<W>(row, 0)) raw[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const int unit = tile + (first + b) * THREADS + t;
                if (unit < units) raw[b] = load<W>(row, unit);
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                if (tile + (first + b) * THREADS + t >= units) break;
                float x[W];
                unpack(raw[b], x);
                accumulate(x, peak[first + b], sum[first + b]);
            }
        }
    }
    if (t < valid % W) {
        const float x[1] = {to_float(row[units * W + t])};
        accumulate(x, peak[0], sum[0]);
    }

    float best = peak[0];
#pragma unroll
    for (int r = 1; r < GROUPS; r++) best = fmaxf(best, peak[r]);
    const float row_max = block_max(best, peaks);
    double total = 0;
#pragma unroll
    for (int r = 0; r < GROUPS; r++) {
        sum[r] *= expf(finite(peak[r]) - finite(row_max));  // from here on relative to the row's maximum
        total += sum[r];
    }
    total = block_sum(total, totals);
    // NaN, +inf, or nothing but -inf: no distribution. The same for every thread.
    if (!(total > 0 && total < INFINITY)) {
        if (t == 0) {
            stats[n * STATS + ROW_MAX] = stats[n * STATS + LOG_Z] = stats[n * STATS + LOW] = NAN;
            stats[n * STATS + KTH_VALUE] = stats[n * STATS + KTH_INDEX] = NAN;
        }
        if (SELECT)
            for (int i = t; i < k; i += THREADS) top[n * k + i] = i;
        return;
    }

    // The groups that hold a winner are read again: their winners are listed, the others' exponentials make up the low
    // sum.
    int dirty = 0, count = k;
    uint64_t threshold = 0;
    if constexpr (SELECT) {
        // At least K elements reach the K-th largest of the groups' maxima. Its 16 highest bits are enough for a
        // threshold.
        threshold = radix_select(k, 48, histogram, found, [&](auto each) {
#pragma unroll
            for (int r = 0; r < GROUPS; r++) each(make_key(peak[r], 0));
        });
#pragma unroll
        for (int r = 0; r < GROUPS; r++) dirty |= (make_key(peak[r], 0) >= threshold) << r;
        if (t == 0) listed[0] = 0;
    } else {
        marks[t] = 0;
        for (int i = t; i < k; i += THREADS) list[i] = index_key(given[n * k + i]);
        __syncthreads();
        for (int i = t; i < k; i += THREADS) {
            const int index = given[n * k + i];
            if (index < 0) continue;
            int thread, r;
            group_of<W>(index, valid, thread, r);
            atomicOr(marks + thread, 1 << r);
        }
        sort_descending(list, k);
        dirty = marks[t];
    }
    double low = 0;
#pragma unroll
    for (int r = 0; r < GROUPS; r++) low += dirty >> r & 1 ? 0.0f : sum[r];
    __syncthreads();
    for (int rest = dirty; rest; rest &= rest - 1) {
        visit_group<W>(row, valid, __ffs(rest) - 1, [&](int first, const auto& x) {
            constexpr int n_values = sizeof(x) / sizeof(float);
            float top = x[0], others = 0;
#pragma unroll
            for (int i = 1; i < n_values; i++) top = fmaxf(top, x[i]);
            const bool plain = SELECT && make_key(top, -1) < threshold;  // no winner in it, as in most units
#pragma unroll
            for (int i = 0; i < n_values; i++) {
                const uint64_t key = plain ? 0 : make_key(x[i], first + i);
                if (SELECT && !plain && key >= threshold) {
                    const int slot = atomicAdd(listed + 0, 1);
                    if (slot < LIST) list[slot] = key;
                } else if (SELECT || !contains(list, k, index_key(first + i))) {
                    others += __expf(x[i] - row_max);
                }
            }
            low += others;
        });
    }
    if constexpr (SELECT) {
        __syncthreads();
        count = listed[0];
        // Too many for the list (a constant row, say): select from the row itself, which takes any input.
        if (count > LIST) {
            const auto all = [&](auto each) {
                for (int r = 0; r < GROUPS; r++)
                    visit_group<W>(row, valid, r, [&](int first, const auto& x) {
                        for (int i = 0; i < (int)(sizeof(x) / sizeof(float)); i++) each(make_key(x[i], first + i));
                    });
            };
            const uint64_t kth = radix_select(k, 0, histogram, found, all);
            if (t == 0) listed[0] = 0;
            __syncthreads();
            low = 0;
            all([&](uint64_t key) {
                if (key >= kth) list[atomicAdd(listed + 0, 1)] = key;
                else low += __expf(key_value(key) - row_max);
            });
            count = k;
        }
        sort_descending(list, count);
    }

    double high = 0;
    for (int i = t; i < count; i += THREADS) {
        if (SELECT) {
            const uint64_t key = list[i];
            const double x = exp((double)key_value(key) - row_max);
            (i < k ? high : low) += x;
            if (i < k) top[n * k + i] = key_index(key);
        } else if (given[n * k + i] >= 0) {
            high += exp((double)to_float(row[given[n * k + i]]) - row_max);
        }
    }
    high = block_sum(high, highs);
    low = block_sum(low, lows);
    if (low < 1e-25) {  // too little for float32, which has lost some of it or all. The same branch for every thread.
        const uint64_t kth = SELECT ? (uint64_t)list[k - 1] : 0;
        low = 0;
        for (int r = 0; r < GROUPS; r++)
            visit_group<W>(row, valid, r, [&](int first, const auto& x) {
                for (int i = 0; i < (int)(sizeof(x) / sizeof(float)); i++) {
                    const bool wins = SELECT ? make_key(x[i], first + i) >= kth
                                             : contains(list, k, index_key(first + i));
                    if (!wins) low += exp((double)x[i] - row_max);
                }
            });
        low = block_sum(low, again);
    }
    if (t == 0) {
        stats[n * STATS + ROW_MAX] = row_max;
        stats[n * STATS + LOG_Z] = log(high + low);
        stats[n * STATS + LOW] = low / (high + low);
        stats[n * STATS + KTH_VALUE] = SELECT ? key_value(list[k - 1]) : NAN;
        stats[n * STATS + KTH_INDEX] = SELECT ? key_index(list[k - 1]) : NAN;
    }
}

// -------------------------------------------------------------------------------------------------- kernel 2: row_loss
struct Share {
    double term;   // of D; the KLs with linear terms (q - p) that cancel over all buckets, so that no share is negative
    double slope;  // p_b a_b, finite also where p_b vanishes
};
__device__ Share share_of(int kind, double beta, double log_p, double log_q) {
    const double p = exp(log_p), q = exp(log_q), delta = log_q - log_p;
    const bool no_p = log_p == -INFINITY, no_q = log_q == -INFINITY;
    if (no_p && no_q) return {0, 0};
    if (kind == FORWARD_KL) return {no_q ? p : q * delta - q + p, -q};
    if (kind == REVERSE_KL) return {no_p ? q : -p * delta - p + q, no_p ? 0 : p * (1 - delta)};
    double m_over_p, m_over_q;  // logarithms
    if (delta <= 0) {
        m_over_p = log1p(beta * expm1(delta));
        m_over_q = m_over_p - delta;
    } else {
        m_over_q = log1p((1 - beta) * expm1(-delta));
        m_over_p = m_over_q + delta;
    }
    const double slope = no_p ? 0 : -(1 - beta) * p * m_over_p;
    return {slope - (no_q ? 0 : beta * q * m_over_q), slope};
}

// first [N, a] and, for the union, second [N, b] list the support; a token of both counts once. Writes index [N, a + b]
// (-1: none) with the gradient there, the scalar for the rest of the row, D and the metrics.
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS)
row_loss(Global<const T> student, int64_t student_stride, Global<const T> teacher, int64_t teacher_stride, int valid,
         int kind, double beta, int outside, Global<const int> first, int a, Global<const int> second, int b,
         Global<const double> student_stats, Global<const double> teacher_stats, Global<float> divergence,
         Global<float> metrics, Global<int> index, Global<float> at_support, Global<double> dense) {
    SHARED(double, log_ps, 2 * MAX_K);
    SHARED(double, log_qs, 2 * MAX_K);
    constexpr int WARPS = LOSS_THREADS / 32;
    SHARED(double, scratch, 11 * WARPS);  // one part for each sum below
    SHARED(float, tops, 2 * WARPS);
    const int t = threadIdx.x;
    const int64_t n = blockIdx.x;
    const Global<const T> z = student + n * student_stride, y = teacher + n * teacher_stride;
    const Global<const double> zs = student_stats + n * STATS, ys = teacher_stats + n * STATS;
    const Global<float> metric = metrics + n * METRICS;
    const double z_max = zs[ROW_MAX], z_log = zs[LOG_Z], y_max = ys[ROW_MAX], y_log = ys[LOG_Z];
    const double z_kth = zs[KTH_VALUE], z_at = zs[KTH_INDEX], y_kth = ys[KTH_VALUE], y_at = ys[KTH_INDEX];
    const bool bad = isnan(z_log) || isnan(y_log), is_union = b > 0;

    // The support, each token once, and the mass that the other side's winners take from this side's tail.
    double in_both = 0, p_extra = 0, q_extra = 0, p_inside = 0, q_inside = 0;
    for (int i = t; i < a + b; i += LOSS_THREADS) {
        int v = i < a ? first[n * a + i] : second[n * b + (i - a)];
        double log_p = -INFINITY, log_q = -INFINITY;
        if (v >= 0 && !bad) {
            const float zv = to_float(z[v]), yv = to_float(y[v]);
            const bool in_first = i < a || ranks(zv, v, z_kth, z_at);
            const bool in_second = is_union && (i >= a || ranks(yv, v, y_kth, y_at));
            if (i >= a && in_first) v = -1;  // already there
            else {
                log_p = (zv - z_max) - z_log;
                log_q = (yv - y_max) - y_log;
                in_both += in_first && in_second;
                p_inside += exp(log_p);
                q_inside += exp(log_q);
                if (!in_first) p_extra += exp(log_p);
                if (is_union && !in_second) q_extra += exp(log_q);
            }
        }
        index[n * (a + b) + i] = bad ? -1 : v;
        log_ps[i] = log_p;
        log_qs[i] = log_q;
    }
    if (bad) {
        for (int i = t; i < a + b; i += LOSS_THREADS) at_support[n * (a + b) + i] = NAN;
        if (t == 0) {
            divergence[n] = NAN;
            for (int i = 0; i < METRICS; i++) metric[i] = NAN;
            metric[TAIL_FLOORED] = 0;
            metric[BAD] = 1;
            dense[n * DENSE + D_MAX] = dense[n * DENSE + D_LOG_SCALE] = dense[n * DENSE + D_SIGN] = NAN;
        }
        return;
    }
    in_both = block_sum(in_both, scratch + 0 * WARPS);
    p_extra = block_sum(p_extra, scratch + 1 * WARPS);
    q_extra = block_sum(q_extra, scratch + 2 * WARPS);
    p_inside = block_sum(p_inside, scratch + 3 * WARPS);
    q_inside = block_sum(q_inside, scratch + 4 * WARPS);

    // The tails. Where the other side's winners are nearly all of what lies outside, the difference has no digits left:
    // sum it anew.
    double p_tail = zs[LOW] - p_extra, q_tail = ys[LOW] - q_extra;
    if (is_union && (p_tail < 0.1 * zs[LOW] || q_tail < 0.1 * ys[LOW])) {
        p_tail = q_tail = 0;
#pragma unroll 4
        for (int v = t; v < valid; v += LOSS_THREADS) {
            const float zv = to_float(z[v]), yv = to_float(y[v]);
            if (ranks(zv, v, z_kth, z_at) || ranks(yv, v, y_kth, y_at)) continue;
            p_tail += exp((zv - z_max) - z_log);
            q_tail += exp((yv - y_max) - y_log);
        }
        p_tail = block_sum(p_tail, scratch + 5 * WARPS);
        q_tail = block_sum(q_tail, scratch + 6 * WARPS);
    }

    double p_scale = 0, q_scale = 0;  // logarithms of what S is divided by; its mass may be too small for a float64
    if (outside == RENORMALISED) {
        double p_top = -INFINITY, q_top = -INFINITY;
        for (int i = t; i < a + b; i += LOSS_THREADS) {
            p_top = fmax(p_top, (double)log_ps[i]);
            q_top = fmax(q_top, (double)log_qs[i]);
        }
        p_top = block_max((float)p_top, tops), q_top = block_max((float)q_top, tops + WARPS);
        double p_sum = 0, q_sum = 0;
        for (int i = t; i < a + b; i += LOSS_THREADS) {
            p_sum += exp(log_ps[i] - p_top);
            q_sum += exp(log_qs[i] - q_top);
        }
        p_sum = block_sum(p_sum, scratch + 9 * WARPS), q_sum = block_sum(q_sum, scratch + 10 * WARPS);
        p_scale = p_top > -INFINITY ? p_top + log(p_sum) : 0;  // nothing there: nothing to divide
        q_scale = q_top > -INFINITY ? q_top + log(q_sum) : 0;
    }
    double value = 0, abar = 0;
    for (int i = t; i < a + b; i += LOSS_THREADS) {
        const Share share = share_of(kind, beta, log_ps[i] - p_scale, log_qs[i] - q_scale);
        value += share.term;
        abar += share.slope;
        log_ps[i] -= p_scale;
        log_qs[i] = share.slope;  // from here on the slopes
    }
    value = block_sum(value, scratch + 7 * WARPS);
    abar = block_sum(abar, scratch + 8 * WARPS);

    const double log_floor = log(1e-30);
    const bool floored = kind == FORWARD_KL && outside == TAIL && q_tail > 0 && log(p_tail) < log_floor;
    double outer = 0;  // dD/dz_u = p_u * outer for every token u outside the support
    if (outside == TAIL) {
        Share tail = share_of(kind, beta, floored ? log_floor : log(p_tail), log(q_tail));
        if (floored) tail.slope = 0;
        value += tail.term;
        abar += tail.slope;
        outer = p_tail > 0 ? tail.slope / p_tail - abar : 0;
    } else if (outside == RAW) {
        outer = -abar;
        // share_of's linear terms cancel over all buckets, and here the tail is missing
        if (kind == FORWARD_KL) value += q_inside - p_inside;
        if (kind == REVERSE_KL) value += p_inside - q_inside;
    }
    for (int i = t; i < a + b; i += LOSS_THREADS) at_support[n * (a + b) + i] = log_qs[i] - exp(log_ps[i]) * abar;
    if (t == 0) {
        divergence[n] = value;
        metric[STUDENT_TAIL] = p_tail;
        metric[TEACHER_TAIL] = q_tail;
        metric[OVERLAP] = is_union ? in_both / a : NAN;
        const double mixture_tail = beta * q_tail + (1 - beta) * p_tail;
        metric[GAP_BOUND] = kind == JSD && outside == TAIL ? mixture_tail * log(2.0) : INFINITY;
        metric[TAIL_FLOORED] = floored;
        metric[BAD] = 0;
        dense[n * DENSE + D_MAX] = z_max;
        dense[n * DENSE + D_LOG_SCALE] = log(fabs(outer)) - z_log;
        dense[n * DENSE + D_SIGN] = sign_of(outer);
    }
}

// -------------------------------------------------------------------------------------------------- kernel 3: row_grad
// result [N, vocab] = upstream [N] times dD/dz; result may be the logits themselves. Columns from valid on are zero.
template <class T, int W>
__global__ void __launch_bounds__(THREADS, 3)
row_grad(Global<const float> upstream, Global<const T> logits, int64_t row_stride, int valid, int vocab,
         Global<const double> dense, Global<const int> index, Global<const float> at_support, int entries,
         Global<T> result, int64_t result_stride) {
    const int t = threadIdx.x;
    const int64_t n = blockIdx.x;
    const Global<const T> row = logits + n * row_stride;
    const Global<T> out = result + n * result_stride;
    const float weight = upstream[n];
    // weight * outer * p_u = sign * 2^((z_u - max) / ln 2 + scale): the scalar goes into the exponent, where it cannot
    // overflow.
    const float row_max = dense[n * DENSE + D_MAX];
    const float sign = dense[n * DENSE + D_SIGN] * sign_of(weight);
    const float scale = (dense[n * DENSE + D_LOG_SCALE] + logf(fabsf(weight))) * LOG2E;
    const int units = valid / W;
    const auto gradient = [&](float x) { return sign * exp2f((x - row_max) * LOG2E + scale); };
    if (sign == 0) {  // nothing outside the support has a gradient: the row need not be read
        const float zero[W] = {};
        for (int unit = t; unit < units; unit += THREADS) store<W>(zero, out, unit);
        if (t < valid % W) store_one(0.0f, out, units * W + t);
    } else {
        for (int tile = 0; tile < units; tile += THREADS * BATCH) {
            decltype(load<W>(row, 0)) raw[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const int unit = tile + b * THREADS + t;
                if (unit < units) raw[b] = load<W>(row, unit);
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const int unit = tile + b * THREADS + t;
                if (unit >= units) break;
                float x[W];
                unpack(raw[b], x);
#pragma unroll
                for (int i = 0; i < W; i++) x[i] = gradient(x[i]);
                store<W>(x, out, unit);
            }
        }
        if (t < valid % W) {
            const int i = units * W + t;
            store_one(gradient(to_float(row[i])), out, i);
        }
    }
    for (int i = valid + t; i < vocab; i += THREADS) store_one(0.0f, out, i);
    __syncthreads();  // the support's entries replace what was just written
    for (int i = t; i < entries; i += THREADS) {
        const int v = index[n * entries + i];
        if (v >= 0) store_one(weight * at_support[n * entries + i], out, v);
    }
}

// -------------------------------------------------------------------------------------------------------- the launches
template <class T> bool aligned(const void* p, int64_t stride) {
    return (uintptr_t)p % 16 == 0 && stride * sizeof(T) % 16 == 0;
}
template <class T> int64_t extent(int64_t rows, int64_t stride, int vocab) {
    return rows ? (rows - 1) * stride + vocab : 0;
}

template <class T, bool SELECT>
void launch_stats(const void* logits, int64_t stride, int64_t rows, int valid, int k, const int* given, int* top,
                  double* stats, void* stream) {
    constexpr int W = 16 / sizeof(T);
    const auto kernel = aligned<T>(logits, stride) ? row_stats<T, W, SELECT> : row_stats<T, 1, SELECT>;
    LAUNCH(kernel, rows, THREADS, stream, global((const T*)logits, extent<T>(rows, stride, valid)), stride, valid, k,
           global(given, SELECT ? 0 : rows * k), global(top, SELECT ? rows * k : 0), global(stats, rows * STATS));
}
template <class T>
void forward(const void* student, int64_t student_stride, const void* teacher, int64_t teacher_stride, int64_t rows,
             int valid, int k, int kind, double beta, int support, int outside, const int* given, int* tops,
             double* stats, float* divergence, float* metrics, int* index, float* at_support, double* dense,
             void* stream) {
    enum { UNION, STUDENT, TEACHER, GIVEN };
    const int* first = support == GIVEN ? given : support == TEACHER ? tops + rows * k : tops;
    double *student_stats = stats, *teacher_stats = stats + rows * STATS;
    if (support == UNION || support == STUDENT)
        launch_stats<T, true>(student, student_stride, rows, valid, k, nullptr, tops, student_stats, stream);
    if (support == UNION || support == TEACHER)
        launch_stats<T, true>(teacher, teacher_stride, rows, valid, k, nullptr, tops + rows * k, teacher_stats, stream);
    if (support == TEACHER || support == GIVEN)
        launch_stats<T, false>(student, student_stride, rows, valid, k, first, nullptr, student_stats, stream);
    if (support == STUDENT || support == GIVEN)
        launch_stats<T, false>(teacher, teacher_stride, rows, valid, k, first, nullptr, teacher_stats, stream);
    const int second = support == UNION ? k : 0;
    LAUNCH(row_loss<T>, rows, LOSS_THREADS, stream, global((const T*)student, extent<T>(rows, student_stride, valid)),
           student_stride, global((const T*)teacher, extent<T>(rows, teacher_stride, valid)), teacher_stride, valid,
           kind, beta, outside, global(first, rows * k), k, global((const int*)(tops + rows * k), rows * second),
           second, global((const double*)student_stats, rows * STATS),
           global((const double*)teacher_stats, rows * STATS), global(divergence, rows),
           global(metrics, rows * METRICS), global(index, rows * (k + second)), global(at_support, rows * (k + second)),
           global(dense, rows * DENSE));
}
template <class T>
void backward(const float* upstream, const void* logits, int64_t stride, int64_t rows, int valid, int vocab,
              const double* dense, const int* index, const float* at_support, int entries, void* result,
              int64_t result_stride, void* stream) {
    constexpr int W = 16 / sizeof(T);
    const bool wide = aligned<T>(logits, stride) && aligned<T>(result, result_stride);
    const auto kernel = wide ? row_grad<T, W> : row_grad<T, 1>;
    LAUNCH(kernel, rows, THREADS, stream, global(upstream, rows),
           global((const T*)logits, extent<T>(rows, stride, valid)), stride, valid, vocab, global(dense, rows * DENSE),
           global(index, rows * entries), global(at_support, rows * entries), entries,
           global((T*)result, extent<T>(rows, result_stride, vocab)), result_stride);
}

// What Python calls. Codes as in the enums above (supports: union, student, teacher, given); all pointers are the
// device's; scratch: tops [2, N, K] int32 and stats [2, N, STATS] float64. They return the launch's status: 0, or a
// number for topk_tail_status_text.
extern "C" int topk_tail_forward(int bf16, const void* student, int64_t student_stride, const void* teacher,
                                 int64_t teacher_stride, int64_t rows, int valid, int k, int kind, double beta,
                                 int support, int outside, const int* given, int* tops, double* stats,
                                 float* divergence, float* metrics, int* index, float* at_support, double* dense,
                                 void* stream) {
    const auto run = bf16 ? forward<__nv_bfloat16> : forward<float>;
    run(student, student_stride, teacher, teacher_stride, rows, valid, k, kind, beta, support, outside, given, tops,
        stats, divergence, metrics, index, at_support, dense, stream);
    return LAUNCH_STATUS();
}
extern "C" int topk_tail_backward(int bf16, const float* upstream, const void* logits, int64_t stride, int64_t rows,
                                  int valid, int vocab, const double* dense, const int* index, const float* at_support,
                                  int entries, void* result, int64_t result_stride, void* stream) {
    const auto run = bf16 ? backward<__nv_bfloat16> : backward<float>;
    run(upstream, logits, stride, rows, valid, vocab, dense, index, at_support, entries, result, result_stride, stream);
    return LAUNCH_STATUS();
}
extern "C" const char* topk_tail_status_text(int status) { return STATUS_TEXT(status); }
