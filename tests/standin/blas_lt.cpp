// A stand-in for cuBLASLt (libcublasLt.so.13): products of column-major matrices, summed in f32 in the order of k and rounded once, with a bias and
// what is added, in the types and alignments that NVIDIA's documentation allows. Codes and enums are those of its headers (CUDA 13.0).
//
// A product is queued on its stream and is in order with what else is queued there; its workspace is written, so that two streams cannot share one.
//
// Where the caller lets a split sum be reduced in the result's type, the sum is split in two and both halves are rounded, as cuBLASLt then may.
// An algorithm serves the product for which it was chosen and no other.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "driver/counts.h"
#include "driver/memory.h"
#include "driver/plant.h"
#include "driver/streams.h"
#include "shim/half.h"

namespace {

enum { OK = 0, INVALID = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum { COMPUTE_32F = 68, OP_N = 0, OP_T = 1, EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };
// cublasLtMatmulDescAttributes_t
enum { DESC_TRANSA = 3, DESC_TRANSB = 4, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8, DESC_BIAS_DATA_TYPE = 26 };
// cublasLtMatmulPreferenceAttributes_t
enum { PREF_WORKSPACE = 1, PREF_REDUCTION = 3, PREF_ALIGN_A = 5, PREF_ALIGN_B = 6, PREF_ALIGN_C = 7, PREF_ALIGN_D = 8 };
// cublasLtReductionScheme_t
enum { REDUCE_IN_PLACE = 1, REDUCE_OUTPUT_TYPE = 4 };

struct Layout {
    Type type;
    uint64_t rows, columns;
    int64_t leading;
};
struct Description {
    int compute, scale, transposes_a = OP_N, transposes_b = OP_N, epilogue = EPILOGUE_DEFAULT, bias_type = -1;
    const void* bias = nullptr;
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t reduction = ~0u, alignment[4] = {256, 256, 256, 256};
};
// What a product is made of but for its addresses; the content of an algorithm.
struct Problem {
    int transposes_a, transposes_b, epilogue, types[4];
    uint32_t m, n, k;
    uint8_t alignment_log2[4], splits;
};
struct Algorithm {
    uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Problem) <= sizeof(Algorithm));

int deny(int code, const char* why) {
    fprintf(stderr, "stand-in cuBLASLt: %s\n", why);
    return code;
}

float read(const void* from, int type, size_t at) {
    if (type == R_32F) return static_cast<const float*>(from)[at];
    uint16_t bits = static_cast<const uint16_t*>(from)[at];
    return type == R_16F ? half::from_f16(bits) : half::from_bf16(bits);
}
void write(void* to, int type, size_t at, float x) {
    if (type == R_32F) {
        static_cast<float*>(to)[at] = x;
    } else {
        static_cast<uint16_t*>(to)[at] = type == R_16F ? half::to_f16(x) : half::to_bf16(x);
    }
}
float rounded(float x, int type) {
    uint32_t room = 0;
    write(&room, type, 0, x);
    return read(&room, type, 0);
}

int log2_of(uint32_t x) { return x ? __builtin_ctz(x) : 8; }

// Fills in `p`, or returns the code with which cuBLASLt refuses the product.
int describe(const Description& d, const Layout& a, const Layout& b, const Layout& c, const Layout& to, Problem& p) {
    memset(&p, 0, sizeof p);
    bool ta = d.transposes_a == OP_T, tb = d.transposes_b == OP_T;
    uint64_t m = ta ? a.columns : a.rows, k = ta ? a.rows : a.columns, n = tb ? b.rows : b.columns;
    if ((tb ? b.columns : b.rows) != k || to.rows != m || to.columns != n || c.rows != m || c.columns != n)
        return deny(INVALID, "the layouts do not fit together");
    for (const Layout* layout : {&a, &b, &c, &to})
        if (layout->leading < int64_t(layout->rows)) return deny(INVALID, "a leading dimension below the number of rows");
    if (d.compute != COMPUTE_32F || d.scale != R_32F) return deny(NOT_SUPPORTED, "another compute type than 32F, or another scale type");
    if (a.type != b.type || c.type != to.type || (to.type != a.type && to.type != R_32F))
        return deny(NOT_SUPPORTED, "types that are in no row of cublasLtMatmul's table");
    if (d.epilogue == EPILOGUE_BIAS) {
        if (!d.bias) return deny(INVALID, "a bias without an address");
        if (d.bias_type != -1 && d.bias_type != int(to.type)) return deny(NOT_SUPPORTED, "a bias of another type than the result's");
    } else if (d.epilogue != EPILOGUE_DEFAULT) {
        return deny(NOT_SUPPORTED, "another epilogue than a bias");
    }
    p.transposes_a = d.transposes_a, p.transposes_b = d.transposes_b, p.epilogue = d.epilogue;
    p.types[0] = a.type, p.types[1] = b.type, p.types[2] = c.type, p.types[3] = to.type;
    p.m = uint32_t(m), p.n = uint32_t(n), p.k = uint32_t(k);
    return OK;
}

// op(x) as f32, [rows, columns] row-major.
std::vector<float> unpacked(const void* x, const Layout& layout, bool transposes, size_t rows, size_t columns) {
    std::vector<float> values(rows * columns);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++)
            values[i * columns + j] = read(x, layout.type, transposes ? i * size_t(layout.leading) + j : j * size_t(layout.leading) + i);
    return values;
}

// Reads or writes the columns of a matrix: what is wrong with that, or nothing.
std::string touch(const void* x, const Layout& layout, bool is_write) {
    const size_t width = layout.type == R_32F ? 4 : 2;
    std::string problem;
    for (uint64_t j = 0; j < layout.columns && problem.empty(); j++)
        problem = memory::touch(Address(x) + j * size_t(layout.leading) * width, layout.rows * width, is_write);
    return problem;
}

// A product that was described, and its operands' addresses.
struct Product {
    Problem problem;
    Description description;
    Layout a_layout, b_layout, c_layout, to_layout;
    const void *a, *b, *c;
    void *to, *workspace;
    size_t workspace_bytes;
    float alpha, beta;
    float biases = 1.0f;

    std::string run() const {
        std::string wrong = touch(a, a_layout, false);
        if (wrong.empty()) wrong = touch(b, b_layout, false);
        if (wrong.empty() && beta != 0.0f) wrong = touch(c, c_layout, false);
        if (wrong.empty() && description.epilogue == EPILOGUE_BIAS)
            wrong = memory::touch(Address(description.bias), problem.m * (problem.types[3] == R_32F ? 4 : 2), false);
        if (wrong.empty()) wrong = touch(to, to_layout, true);
        // Two that share it share its start.
        if (wrong.empty()) wrong = memory::touch(Address(workspace), std::min<size_t>(workspace_bytes, 4096), true);
        if (wrong.empty()) multiply();
        return wrong;
    }

    void multiply() const {
        const size_t m = problem.m, n = problem.n, k = problem.k, half = (k + 1) / 2;
        // Column j of the result is a row of the transposed one: its values lie side by side, and so do those of a's column.
        const std::vector<float> left = unpacked(a, a_layout, description.transposes_a == OP_N, k, m);   // [k, m]: op(a) transposed
        const std::vector<float> right = unpacked(b, b_layout, description.transposes_b == OP_N, n, k);  // [n, k]: op(b) transposed
        std::vector<float> sum(m), first(m);
        for (size_t j = 0; j < n; j++) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (size_t l = 0; l < k; l++) {
                if (problem.splits == 2 && l == half) {
                    first = sum;
                    std::fill(sum.begin(), sum.end(), 0.0f);
                }
                const float factor = right[j * k + l];
                const float* column = &left[l * m];
                for (size_t i = 0; i < m; i++) sum[i] += column[i] * factor;
            }
            for (size_t i = 0; i < m; i++) {
                const size_t at = j * size_t(to_layout.leading) + i;
                float x = problem.splits == 2 && k > half ? rounded(first[i], problem.types[3]) + rounded(sum[i], problem.types[3]) : sum[i];
                x *= alpha;
                if (beta != 0.0f) x += beta * read(c, problem.types[2], j * size_t(c_layout.leading) + i);
                if (description.epilogue == EPILOGUE_BIAS) x += biases * read(description.bias, problem.types[3], i);
                write(to, problem.types[3], at, x);
            }
        }
    }
};

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void** handle) { return *handle = new int, OK; }
int cublasLtDestroy(void* handle) { return delete static_cast<int*>(handle), OK; }
int cublasLtMatrixLayoutCreate(Layout** to, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    if (type != R_32F && type != R_16F && type != R_16BF) return deny(NOT_SUPPORTED, "a type of elements");
    return *to = new Layout{Type(type), rows, columns, leading}, OK;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, OK; }
int cublasLtMatmulDescCreate(Description** to, int compute, int scale) { return *to = new Description{compute, scale}, OK; }
int cublasLtMatmulDescDestroy(Description* description) { return delete description, OK; }
int cublasLtMatmulDescSetAttribute(Description* d, int attribute, const void* value, size_t bytes) {
    auto set = [&](auto& to) { return bytes == sizeof to ? (memcpy(&to, value, bytes), OK) : deny(INVALID, "an attribute's size"); };
    switch (attribute) {
        case DESC_TRANSA: return set(d->transposes_a);
        case DESC_TRANSB: return set(d->transposes_b);
        case DESC_EPILOGUE: return set(d->epilogue);
        case DESC_BIAS_POINTER: return set(d->bias);
        case DESC_BIAS_DATA_TYPE: return set(d->bias_type);
        default: return deny(INVALID, "an attribute of a description that it does not know");
    }
}
int cublasLtMatmulPreferenceCreate(Preference** to) { return *to = new Preference, OK; }
int cublasLtMatmulPreferenceDestroy(Preference* preference) { return delete preference, OK; }
int cublasLtMatmulPreferenceSetAttribute(Preference* p, int attribute, const void* value, size_t bytes) {
    auto set = [&](auto& to) { return bytes == sizeof to ? (memcpy(&to, value, bytes), OK) : deny(INVALID, "an attribute's size"); };
    switch (attribute) {
        case PREF_WORKSPACE: return set(p->workspace);
        case PREF_REDUCTION: return set(p->reduction);
        case PREF_ALIGN_A:
        case PREF_ALIGN_B:
        case PREF_ALIGN_C:
        case PREF_ALIGN_D: return set(p->alignment[attribute - PREF_ALIGN_A]);
        default: return deny(INVALID, "an attribute of a preference that it does not know");
    }
}
int cublasLtMatmulAlgoGetHeuristic(void*, const Description* d, const Layout* a, const Layout* b, const Layout* c, const Layout* to,
                                   const Preference* preference, int, Heuristic* result, int* found) {
    *found = 0;
    Problem problem;
    if (int code = describe(*d, *a, *b, *c, *to, problem)) return code;
    for (int i = 0; i < 4; i++) problem.alignment_log2[i] = uint8_t(log2_of(preference->alignment[i]));
    problem.splits = preference->reduction & (REDUCE_IN_PLACE | REDUCE_OUTPUT_TYPE) ? 2 : 1;
    memset(result, 0, sizeof *result);
    memcpy(&result->algorithm, &problem, sizeof problem);
    *found = 1;
    return OK;
}
int cublasLtMatmul(void*, const Description* d, const float* alpha, const void* a, const Layout* a_layout, const void* b, const Layout* b_layout,
                   const float* beta, const void* c, const Layout* c_layout, void* to, const Layout* to_layout, const Algorithm* algorithm,
                   void* workspace, size_t workspace_bytes, void* stream) {
    LOCKED;
    if (standin_begin("cublasLtMatmul")) return EXECUTION_FAILED;
    Problem problem, chosen;
    if (int code = describe(*d, *a_layout, *b_layout, *c_layout, *to_layout, problem)) return code;
    if (!algorithm) return deny(INVALID, "a product without an algorithm");
    memcpy(&chosen, algorithm, sizeof chosen);
    memcpy(problem.alignment_log2, chosen.alignment_log2, sizeof problem.alignment_log2);
    problem.splits = chosen.splits;
    if (memcmp(&problem, &chosen, sizeof problem)) return deny(INVALID, "an algorithm that was chosen for another product");
    const void* addresses[] = {a, b, c, to};
    for (int i = 0; i < 4; i++)
        if (uintptr_t(addresses[i]) & ((uintptr_t(1) << chosen.alignment_log2[i]) - 1))
            return deny(INVALID, "an address that is less aligned than the preference says");
    if (c == to && memcmp(c_layout, to_layout, sizeof *c_layout)) return deny(INVALID, "a product in place with two layouts");
    const std::string shape = std::string(d->transposes_a == OP_T ? "T" : "N") + (d->transposes_b == OP_T ? "T" : "N") + " " +
                              std::to_string(problem.m) + " " + std::to_string(problem.n) + " " + std::to_string(problem.k);
    Product product = {problem, *d, *a_layout, *b_layout, *c_layout, *to_layout, a, b, c, to, workspace, workspace_bytes, *alpha, *beta};
    const plant::Error& error = plant::at("product " + shape);
    if (error.is("leave_out")) return OK;
    if (error.is("elsewhere")) stream = plant::elsewhere();
    if (error.is("leading")) product.a_layout.leading += error.a;
    if (error.is("halves")) product.a_layout.type = product.b_layout.type = R_16BF;
    if (error.is("alpha")) product.alpha = float(error.a) / 100.0f;
    if (error.is("beta")) product.beta = float(error.a) / 100.0f;
    if (error.is("biased")) product.biases = float(error.a);
    if (error.is("twice") && !streams::queue(stream, "product " + shape, [=] { return product.run(); })) return INVALID;
    if (!streams::queue(stream, "product " + shape, [=] { return product.run(); })) return INVALID;
    counts::product(shape);
    return OK;
}
}
