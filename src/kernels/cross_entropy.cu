// Softmax cross-entropy in place; cross_entropy.rs has the specification. A block a row, in two passes: the maximum and the sum of powers
// together, then the gradient over the logits.
//
// Logits come in chunks of rows, each from a GEMM of the rows with the output layer, and their gradient goes into the next GEMM before the
// next chunk is made: never are all logits in memory. A row of 65024 bf16 is 127 KiB, which the second pass finds in L2.
//
// Bytes a row of V values of s bytes: loss alone s V + 12 (target, its logit; loss); with the gradient 3 s V + 12, of which memory gives s V
// once and takes s V. A row that is not in the loss: s V written.
// Operations a value: 3 and an exponential in each pass, about 2 a byte, so memory bounds it.
//
// shared: * 16 * 4
#include "device.cuh"

constexpr int THREADS = 512;

struct CrossEntropyArgs {
    void* logits;               // [N, V]; becomes the gradient
    const int* targets;         // [N]: ids below V; -1: the row's loss and gradient are 0
    float* losses;              // [N]
    unsigned long long* fault;  // lowest row whose target is neither -1 nor below V; it counts as -1
    int columns;                // V, a multiple of 16 bytes
    float scale;                // of the gradient
};

// Nothing but -inf: the powers of such are 0, not NaN.
DEVICE float shift_of(float top) { return top == NEG_INFINITY ? 0.0f : top; }

DEVICE float loss_of(float total, float logit) { return fast_log2(total) * LN_2 - logit; }

template <typename T, bool GRADIENT>
DEVICE void cross_entropy(const CrossEntropyArgs& args) {
    float* scratch = reinterpret_cast<float*>(shared_memory());
    const int64_t row = blockIdx.x;
    const int target = args.targets[row];
    T* logits = static_cast<T*>(args.logits) + row * args.columns;
    const int first = int(threadIdx.x) * WIDE<T>, step = THREADS * WIDE<T>;
    if (target < 0 || target >= args.columns) {
        if (threadIdx.x == 0) args.losses[row] = 0.0f;
        if (threadIdx.x == 0 && target != -1) report(args.fault, row);
        if (GRADIENT) {
            Vec<T, WIDE<T>> zeros;
            for (int j = 0; j < WIDE<T>; j++) zeros.v[j] = from_f32<T>(0.0f);
            for (int at = first; at < args.columns; at += step) store(logits + at, zeros);
        }
        return;
    }
    const float target_logit = threadIdx.x == 0 ? to_f32(logits[target]) : 0.0f;
    float top = NEG_INFINITY, sum = 0.0f;
    for (int at = first; at < args.columns; at += step) {
        const auto x = load<WIDE<T>>(logits + at);
        float next = top;
#pragma unroll
        for (int j = 0; j < WIDE<T>; j++) next = max_of(next, to_f32(x.v[j]));
        const float shift = shift_of(next);
        sum *= fast_exp(top - shift);
#pragma unroll
        for (int j = 0; j < WIDE<T>; j++) sum += fast_exp(to_f32(x.v[j]) - shift);
        top = next;
    }
    const float shift = shift_of(block_max(top, scratch));
    const float total = block_sum(sum * fast_exp(top - shift), scratch);
    if (threadIdx.x == 0) args.losses[row] = loss_of(total, target_logit - shift);
    if (GRADIENT) {
        const float inverse = 1.0f / total;
        for (int at = first; at < args.columns; at += step) {
            auto x = load<WIDE<T>>(logits + at);
#pragma unroll
            for (int j = 0; j < WIDE<T>; j++) {
                const float value = to_f32(x.v[j]);
                const float p = fast_exp(value - shift) * inverse;
                // Where the loss is not finite: the norm of the gradient is to tell.
                const float at_target = is_finite(loss_of(total, value - shift)) ? p - 1.0f : not_a_number();
                x.v[j] = from_f32<T>((at + j == target ? at_target : p) * args.scale);
            }
            store(logits + at, x);
        }
    }
}

KERNEL(cross_entropy_loss_f32, CrossEntropyArgs, THREADS, 2) { cross_entropy<float, false>(args); }
KERNEL(cross_entropy_loss_bf16, CrossEntropyArgs, THREADS, 2) { cross_entropy<bf16, false>(args); }
KERNEL(cross_entropy_loss_f16, CrossEntropyArgs, THREADS, 2) { cross_entropy<f16, false>(args); }
KERNEL(cross_entropy_grad_f32, CrossEntropyArgs, THREADS, 2) { cross_entropy<float, true>(args); }
KERNEL(cross_entropy_grad_bf16, CrossEntropyArgs, THREADS, 2) { cross_entropy<bf16, true>(args); }
KERNEL(cross_entropy_grad_f16, CrossEntropyArgs, THREADS, 2) { cross_entropy<f16, true>(args); }
