// Reads a program as tests/ptx/program.py writes it.
#include <algorithm>
#include <cstdarg>
#include <sstream>

#include "decode.h"
#include "families.h"

namespace ptx {

std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

// ---- Words

Words::Words(const std::string& opcode, int line) : opcode_(opcode), line_(line) {
  size_t begin = 0;
  while (begin <= opcode.size()) {
    // `::` belongs to a word: shared::cta.
    const size_t end = std::min(opcode.find('.', begin), opcode.size());
    words_.push_back(opcode.substr(begin, end - begin));
    begin = end + 1;
  }
}

bool Words::take(const char* word) {
  for (size_t i = 1; i < words_.size(); ++i)
    if (words_[i] == word) {
      words_.erase(words_.begin() + i);
      return true;
    }
  return false;
}

int Words::take_one(std::initializer_list<const char*> words) {
  int index = 0;
  for (const char* word : words) {
    if (take(word)) return index;
    ++index;
  }
  return -1;
}

int Words::need_one(std::initializer_list<const char*> words) {
  const int index = take_one(words);
  if (index < 0) {
    std::string all;
    for (const char* word : words) all += std::string(all.empty() ? "." : ", .") + word;
    unknown("needs one of " + all);
  }
  return index;
}

std::string Words::next() {
  if (words_.size() < 2) return "";
  const std::string word = words_[1];
  words_.erase(words_.begin() + 1);
  return word;
}

std::string Words::peek() const { return words_.size() < 2 ? "" : words_[1]; }

void Words::end() const {
  if (words_.size() > 1) unknown("the machine doesn't know ." + words_[1] + " of it");
}

void Words::unknown(const std::string& what) const {
  throw Unknown(format("line %d: %s: %s", line_, opcode_.c_str(), what.c_str()));
}

// ---- Families

static std::map<std::string, Decode>& families() {
  static std::map<std::string, Decode> all;
  return all;
}

Family::Family(const char* word, Decode decode) {
  if (!families().emplace(word, decode).second) throw std::logic_error(std::string("two families of ") + word);
}

Decode family(const std::string& word) {
  const auto found = families().find(word);
  return found == families().end() ? nullptr : found->second;
}

void need_operands(const Words& words, const Instr& instr, size_t least, size_t most) {
  if (instr.ops.size() < least || instr.ops.size() > most)
    words.unknown(format("takes %zu to %zu operands, not %zu", least, most, instr.ops.size()));
}

static void collect(const Operand& operand, std::vector<Operand>& registers) {
  if (operand.is == Is::Register) registers.push_back(operand);
  else if (operand.is == Is::Vector || operand.is == Is::Pair)
    for (const Operand& part : operand.parts) collect(part, registers);
}

std::vector<Operand> Instr::destinations() const {
  std::vector<Operand> registers;
  if (!ops.empty()) collect(ops[0], registers);
  return registers;
}

std::vector<Operand> Instr::registers() const {
  std::vector<Operand> registers;
  for (const Operand& op : ops) collect(op, registers);
  return registers;
}

// ---- The text

namespace {

class Reader {
 public:
  explicit Reader(const std::string& text) : next_(text.c_str()) {}

  std::string word() {
    while (*next_ == ' ' || *next_ == '\n') ++next_;
    const char* begin = next_;
    while (*next_ && *next_ != ' ' && *next_ != '\n') ++next_;
    return std::string(begin, next_);
  }
  int64_t number() {
    char* end;
    const int64_t value = std::strtoll(next_, &end, 10);
    if (end == next_) throw Unknown("the program's text is broken");
    next_ = end;
    return value;
  }
  void expect(const char* name) {
    const std::string found = word();
    if (found != name) throw Unknown(format("the program's text has '%s' for '%s'", found.c_str(), name));
  }
  uint32_t named(const char* name) {
    expect(name);
    return number();
  }

 private:
  const char* next_;
};

Operand read_operand(Reader& in, const Program& program) {
  Operand op;
  const std::string kind = in.word();
  auto parts = [&](int count) {
    for (int i = 0; i < count; ++i) op.parts.push_back(read_operand(in, program));
  };
  auto number_of = [&](Is is) {
    op.is = is;
    op.value = in.number();
  };
  switch (kind.size() == 1 ? kind[0] : '?') {
    case 'R':
    case 'N':
      op.is = kind[0] == 'R' ? Is::Register : Is::NotPredicate;
      op.reg = in.number();
      op.width = program.widths.at(op.reg);
      op.at = program.places.at(op.reg);
      break;
    case 'I': number_of(Is::Immediate); break;
    case 'V':
      op.is = Is::Vector;
      parts(in.number());
      break;
    case 'A': {
      number_of(Is::Address);
      parts(in.number());
      break;
    }
    case 'P':
      op.is = Is::Pair;
      parts(2);
      break;
    case 'L': number_of(Is::Label); break;
    case 'T': {
      op.is = Is::Labels;
      const int count = in.number();
      for (int i = 0; i < count; ++i) {
        Operand label;
        label.is = Is::Label;
        label.value = in.number();
        op.parts.push_back(label);
      }
      break;
    }
    case 'S':
      op.is = Is::Special;
      op.word = in.word();
      break;
    case 'Z': op.is = Is::Sink; break;
    case 'H': number_of(Is::Shared); break;
    case 'D': number_of(Is::Local); break;
    case 'M': number_of(Is::Parameter); break;
    case 'Q': number_of(Is::Scratch); break;
    default: throw Unknown("the program's text has no operand " + kind);
  }
  return op;
}

}  // namespace

std::unique_ptr<Program> read_program(const std::string& text) {
  auto program = std::make_unique<Program>();
  Reader in(text);
  in.expect("kernel");
  program->kernel = in.word();
  const int registers = in.named("regs");
  for (int i = 0; i < registers; ++i) {
    const int width = in.number();
    program->widths.push_back(width);
    program->places.push_back(program->file_bytes);
    // A predicate is one bit a lane; what is narrower than 32 bits takes 32.
    program->file_bytes += width == 1 ? 8 : LANES * (width <= 32 ? 4 : width / 8);
  }
  program->shared = in.named("shared");
  program->local = in.named("local");
  program->params = in.named("params");
  program->scratch = in.named("scratch");
  in.expect("cluster");
  for (uint32_t& size : program->cluster) size = in.number();
  const int count = in.named("code");
  for (int i = 0; i < count; ++i) {
    in.expect("I");
    Instr instr;
    instr.line = in.number();
    instr.opcode = in.word();
    instr.guard = in.number();
    instr.guard_negated = in.number();
    const int operands = in.number();
    for (int k = 0; k < operands; ++k) instr.ops.push_back(read_operand(in, *program));
    Words words(instr.opcode, instr.line);
    const Decode decode = family(words.first());
    if (decode == nullptr) words.unknown("the machine has no such instruction");
    decode(words, instr);
    words.end();
    if (instr.run == nullptr) words.unknown("the machine has no such instruction");
    program->code.push_back(std::move(instr));
  }
  for (const Instr& instr : program->code)
    for (const char* word : {"mbarrier.arrive", "release", "acq_rel", "fence.sc", "membar"})
      program->lanes_release |= instr.opcode.find(word) != std::string::npos;
  // Registers that a wgmma accumulates in or takes A from: whoever else accesses them owes a fence.
  std::vector<bool> of_wgmma(registers);
  bool any = false;
  for (const Instr& instr : program->code)
    if (instr.opcode.rfind("wgmma.mma_async", 0) == 0)
      for (const Operand& op : instr.ops)
        for (const Operand& part : op.parts)
          if (part.is == Is::Register) any = of_wgmma[part.reg] = true;
  if (any)
    for (Instr& instr : program->code)
      if (instr.opcode.rfind("wgmma.", 0) != 0)
        for (const Operand& op : instr.registers()) instr.dirties_wgmma |= of_wgmma[op.reg];
  return program;
}

}  // namespace ptx
